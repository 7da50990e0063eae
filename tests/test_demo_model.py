"""The bundled model is what its card says: measured here through plain transformers, with the Renderer's prompts and full-label scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mechicl
from mechicl.prompts.render import Renderer
from mechicl.training.card import EVALUATION, Setting
from mechicl.training.evaluate import Outcome, answer, deal_labels, without_shots
from mechicl.training.growth import read_growth

FOLDER = Path(mechicl.__file__).parent / "assets" / "demo_vlm"
N = 192
SEED = 2026
"""The first of the episodes that the card was measured on."""


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Renderer]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(FOLDER).eval()
    return model, Renderer(AutoProcessor.from_pretrained(FOLDER), model.config)


def ask(plain: tuple[Any, Renderer], setting: Setting, control: Any = None, n: int = 64) -> Outcome:
    episodes = setting.episodes(n, seed=SEED)
    return answer(*plain, control(episodes) if control else episodes)


def test_the_folder_is_small_and_holds_ordinary_files() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) <= 5_000_000
    assert {"model.safetensors", "config.json", "tokenizer.json", "growth.json", "training_log.jsonl", "README.md", EVALUATION} <= set(
        sizes
    )
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in sizes)


def test_it_names_held_out_concepts_from_two_examples_of_four_classes(plain: tuple[Any, Renderer]) -> None:
    setting = Setting("concepts", 4, 2)
    shown = ask(plain, setting, n=N)
    assert shown.accuracy.value >= 0.95
    assert shown.greedy.value >= 0.90  # the whole label, its last token included, is also what greedy decoding would write
    dealt = ask(plain, setting, deal_labels)
    unshown = ask(plain, setting, without_shots)
    # chance is .25: 99.9 % of 64 throws at .25 stay below .43, and dealing can leave a pair right
    assert dealt.accuracy.value < 0.45
    assert unshown.accuracy.value < 0.45


def test_it_names_held_out_concepts_from_one_example_of_eight_classes(plain: tuple[Any, Renderer]) -> None:
    assert ask(plain, Setting("concepts", 8, 1), n=128).accuracy.value >= 0.85


def test_larger_pictures_of_several_tokens_work_as_well(plain: tuple[Any, Renderer]) -> None:
    assert ask(plain, Setting("concepts", 4, 2, size=56), n=32).accuracy.value >= 0.85


def test_real_digits_are_named_clearly_above_both_controls(plain: tuple[Any, Renderer]) -> None:
    setting = Setting("digits", 4, 2)
    shown, dealt, unshown = (ask(plain, setting, control) for control in (None, deal_labels, without_shots))
    assert shown.accuracy.low > dealt.accuracy.high
    assert shown.accuracy.low > unshown.accuracy.high


def test_the_card_reports_the_required_numbers_and_its_table_is_the_measurement() -> None:
    from mechicl.training.card import to_markdown

    table = json.loads((FOLDER / EVALUATION).read_text())
    assert table[Setting("concepts", 4, 2).name]["examples"]["accuracy"]["value"] >= 0.95
    assert table[Setting("concepts", 8, 1).name]["examples"]["accuracy"]["value"] >= 0.85
    assert to_markdown(table) in (FOLDER / "README.md").read_text()


def test_the_growth_curve_shows_the_ability_arrive() -> None:
    series = read_growth(FOLDER)
    assert 12 <= len(series.steps) <= 40
    pictures = series.values["accuracy, pictures 4 x 2"]
    induction = series.values["induction, best head"]
    assert pictures[0] < 0.1 < 0.9 < pictures[-1]
    assert induction[0] < 0.1 < 0.3 < induction[-1]
    assert [name for _, name in series.stages] == ["repeated sequences", "bare words", "bare pictures", "everything"]
