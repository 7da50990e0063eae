"""Training organisms: the fast prompts are the Renderer's, the targets are what can be known, a killed run goes on to the same bits."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Generator

from mechicl.errors import CheckpointError, OptionError, OutputPathError
from mechicl.prompts.render import Renderer
from mechicl.training.assembly import (
    Rows,
    Shape,
    Skeleton,
    assemble,
    compile_skeleton,
    example,
    model_inputs,
    pixels,
    strip_template,
    targets,
)
from mechicl.training.glyphs import HELD_OUT, draw_glyphs
from mechicl.training.growth import growth_steps, head_scores, read_growth
from mechicl.training.organisms import build
from mechicl.training.runs import Run
from mechicl.training.stages import demo, micro, plan
from mechicl.training.tasks import Bench, draw_items, draw_orders, read_lexicon
from mechicl.training.vision import together
from mechicl.training.vlm import train

TRAINED = ("qwen2_5_vl", "qwen3_vl", "llava", "internvl", "gemma3", "smolvlm")
SHAPES = (
    Shape(2, 2, size=28),
    Shape(3, 1, size=56, words=True, instruction="Name the picture.", question="What is this?"),
    Shape(2, 1, size=0, words=True),
)
WORDS = ["ba", "kimo", "voruli", "tazunebo", "modelu", "tosi", "mizo", "name"]


@pytest.mark.parametrize("shape", SHAPES, ids=("pictures", "pictures and words", "words"))
@pytest.mark.parametrize("family", TRAINED)
def test_fast_prompts_equal_the_renderers_in_every_family(family: str, shape: Shape) -> None:
    model, processor = build(family, preset="demo")
    renderer = Renderer(processor, model.config)
    lexicon = read_lexicon(renderer, WORDS)
    texts = lexicon.captions if shape.size else lexicon.texts
    rng = random.Random(family)
    batch = 3
    order = draw_orders(shape, batch, rng)
    names = [rng.sample(range(len(WORDS)), 2 * shape.n_classes) for _ in range(batch)]
    labels = [few[: shape.n_classes] for few in names]
    words = [few[shape.n_classes :] for few in names]
    drawn = draw_items(torch.tensor(order), shape.n_classes, shape.size or 28, Generator().manual_seed(1), glyphs=0.4, split="train")
    skeleton = compile_skeleton(renderer, shape)
    rows = assemble(
        skeleton,
        [[lexicon.labels[i] for i in few] for few in labels],
        [[texts[i] for i in few] for few in words],
        order,
        pad=processor.tokenizer.pad_token_id,
        answer=False,
    )
    fast = model_inputs(model, rows, pixels(processor, drawn, shape.n_items) if shape.size else {})
    shown = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in drawn]
    episodes = [
        example(
            shape, [WORDS[i] for i in labels[k]], [WORDS[i] for i in words[k]], shown[k * shape.n_items : (k + 1) * shape.n_items], order[k]
        )
        for k in range(batch)
    ]
    slow = renderer.render(episodes)
    for name, value in fast.items():
        wanted = slow.inputs[name]
        assert value.shape == wanted.shape, name
        assert torch.equal(value.to(wanted.dtype), wanted), name
    left_out = set(slow.inputs) - set(fast) - {"mm_token_type_ids", "token_type_ids"}  # all zero or inert where a family does not read them
    assert not left_out & {"pixel_values", "image_grid_thw", "pixel_attention_mask", "image_sizes"}, left_out
    with torch.no_grad():
        mine = model(**fast).logits[:, -1]
        theirs = model(**slow.inputs).logits[:, -1]
    assert torch.equal(mine, theirs)
    # the answer that training appends is the candidate that scoring appends
    full = assemble(
        skeleton,
        [[lexicon.labels[i] for i in few] for few in labels],
        [[texts[i] for i in few] for few in words],
        order,
        pad=processor.tokenizer.pad_token_id,
    )
    for k in range(batch):
        start, stop = int(full.starts[k, -1]), int(full.stops[k, -1])
        assert tuple(full.input_ids[k, start:stop].tolist()) == slow.candidate_ids[k][slow.answers[k]]
        assert full.input_ids.shape[1] > int(full.stops[k, -1])  # something ends the answer


def test_only_labels_of_classes_already_shown_are_targets() -> None:
    ids = torch.arange(12)[None]
    rows = Rows(ids, torch.ones_like(ids), torch.tensor([[1, 4, 6, 9]]), torch.tensor([[2, 5, 8, 10]]))
    wanted = targets(rows, torch.tensor([[0, 1, 0, 1]]))
    assert wanted[0].nonzero()[:, 0].tolist() == [6, 7, 8, 9, 10]  # third and fourth label with the token behind each
    assert not targets(rows, torch.tensor([[0, 1, 2, 3]])).any()  # nothing repeats, nothing can be known


def test_repeated_sequences_ask_for_the_second_half_only() -> None:
    bench = small_bench()
    work = bench.repeats(random.Random(0), Generator().manual_seed(0))
    ids = work.inputs["input_ids"]
    half = ids.shape[1] // 2
    assert torch.equal(ids[:, :half], ids[:, half:])
    assert work.wanted.sum(1).tolist() == [half - 1] * len(ids)
    assert not work.wanted[:, : half + 1].any()


def small_bench(seed: int = 0) -> Bench:
    model, processor = build("qwen2_5_vl", preset="demo", seed=seed)
    return Bench(model, processor, Renderer(processor, model.config), seed=seed, tokens=256)


def test_a_steps_batch_depends_on_nothing_but_seed_and_step() -> None:
    stage = demo().stages[-1]
    one, other, third = small_bench(), small_bench(), small_bench(seed=1)
    one.work(stage.choices, 3)
    for step in (5, 6):
        a, b, c = (bench.work(stage.choices, step) for bench in (one, other, third))
        assert a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(a.inputs[k], b.inputs[k]) for k in a.inputs)
        assert a.inputs["input_ids"].shape != c.inputs["input_ids"].shape or not torch.equal(a.inputs["input_ids"], c.inputs["input_ids"])


def test_words_and_glyphs_of_probes_are_never_drawn_in_training() -> None:
    bench = small_bench()
    assert not set(bench.lexicons["train"].words) & set(bench.lexicons["held_out"].words)
    stage = demo().stages[-1]
    assert all(choice.glyphs <= 1 for choice in stage.choices)
    assert HELD_OUT > 1 << 39  # ids drawn in training lie below 2**39


def test_glyphs_of_a_class_look_alike_and_the_same_seed_gives_the_same_bytes() -> None:
    ids = torch.arange(8).repeat_interleave(12)
    draw = lambda: draw_glyphs(ids, 28, Generator().manual_seed(3), group=len(ids))  # noqa: E731
    assert torch.equal(draw(), draw())

    def nearest_mean(pictures: torch.Tensor) -> float:
        x = pictures.float().mean(1).flatten(1).view(8, 12, -1)
        means, rest = x[:, :6].mean(1), x[:, 6:].flatten(0, 1)
        return float((torch.cdist(rest, means).argmin(1) == torch.arange(8).repeat_interleave(6)).float().mean())

    shuffled = draw_glyphs(torch.arange(96), 28, Generator().manual_seed(3), group=96)
    assert nearest_mean(draw()) > 0.5  # pixels alone tell eight classes apart far above 1/8 ...
    assert nearest_mean(shuffled) < 0.35  # ... and do not where every picture is of another class


KILLED = """
import os, sys, torch
torch.set_num_threads(1)
import mechicl.training.runs as runs
from mechicl.training.vlm import train
calls, limit, fsync = 0, int(sys.argv[2]), os.fsync
def dying(handle):
    global calls
    calls += 1
    if calls == limit:
        os.kill(os.getpid(), 9)
    fsync(handle)
runs.os.fsync = dying
train(preset="micro", out=sys.argv[1], resume=True, progress=False)
"""


def test_a_run_killed_at_two_random_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = train(preset="micro", out=tmp_path / "whole", progress=False)
    draw = random.Random(20)
    for _ in range(2):  # moments: the n-th time that anything is written to the disk, in the middle of writing it
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed"), str(draw.randint(3, 9))], capture_output=True)
        assert done.returncode == -9, done.stderr.decode()[-2000:]
    again = train(preset="micro", out=tmp_path / "killed", resume=True, progress=False)
    one, other = load_file(whole / "model.safetensors"), load_file(again / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    without_clock = lambda line: {k: v for k, v in line.items() if k != "seconds"}  # noqa: E731
    lines = [[without_clock(line) for line in Run(tmp_path / name).lines()] for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert (whole / "growth.json").read_bytes() == (again / "growth.json").read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "micro"
    train(preset="micro", out=folder, progress=False)
    return folder


def test_the_folder_loads_through_the_auto_classes_and_training_changed_the_weights(trained: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(trained / "model")
    AutoProcessor.from_pretrained(trained / "model")
    fresh, _ = build("qwen2_5_vl", preset="demo", seed=0)
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)  # vision included: only unused parameters may stay
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in trained.rglob("*"))


def test_growth_is_written_and_read_back(trained: Path) -> None:
    series = read_growth(trained / "model")
    assert series.steps[0] == 0
    assert series.steps[-1] == 14
    assert [name for _, name in series.stages] == [stage.name for stage in micro().stages]
    assert {"CLA", "induction, best head", "accuracy, words"} <= set(series.values)
    for name, value in series.values.items():
        assert len(value) == len(series.steps)
        assert (series.low[name] <= value + 1e-9).all()
    with pytest.raises(CheckpointError, match=r"growth\.json"):
        read_growth(trained)


def test_resuming_a_finished_run_changes_nothing(trained: Path) -> None:
    before = (trained / "model" / "model.safetensors").read_bytes()
    train(preset="micro", out=trained, resume=True, progress=False)
    assert (trained / "model" / "model.safetensors").read_bytes() == before


def test_a_changed_configuration_is_refused_by_name(trained: Path) -> None:
    with pytest.raises(CheckpointError, match="seed must be what the run"):
        train(preset="micro", out=trained, seed=1, resume=True, progress=False)
    with pytest.raises(CheckpointError, match="family must be what the run"):
        train("llava", preset="micro", out=trained, resume=True, progress=False)
    with pytest.raises(OutputPathError, match="resume=True"):
        train(preset="micro", out=trained, progress=False)


def test_a_damaged_checkpoint_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "config.json").write_text((trained / "config.json").read_text())
    whole = (trained / "state.safetensors").read_bytes()
    (folder / "state.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="whole checkpoint"):
        train(preset="micro", out=folder, resume=True, progress=False)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="readable JSON"):
        train(preset="micro", out=folder, resume=True, progress=False)


def test_other_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(OutputPathError, match="other files"):
            train(preset="micro", out=tmp_path, resume=resume, progress=False)
    with pytest.raises(OutputPathError, match="can be written"):
        train(preset="micro", out=tmp_path / "thesis.txt" / "run", progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "gpt2"}, "family must be one of"),
        ({"family": "paligemma"}, "both directions"),
        ({"family": "mllama"}, "not tokens"),
        ({"preset": "huge"}, "preset must be one of"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        train(**({"family": "qwen2_5_vl", "preset": "micro", "out": tmp_path / "run", "progress": False} | options))
    assert not (tmp_path / "run").exists()


def test_a_plan_is_json_and_its_growth_points_are_spread_evenly_on_a_logarithm() -> None:
    assert json.loads(json.dumps(plan("demo").to_json()))["stages"][0]["name"] == "repeated sequences"
    steps = sorted(growth_steps(5000, 20))
    assert steps[0] == 0
    assert steps[-1] == 5000
    assert 15 <= len(steps) <= 22


@pytest.mark.parametrize("size", [28, 56, 84])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava"])
def test_pictures_seen_together_give_the_same_numbers(family: str, size: int) -> None:
    model, processor = build(family, preset="demo")
    drawn = draw_items(torch.tensor([[0, 1, 0]]), 2, size, Generator().manual_seed(4), glyphs=1.0, split="train")
    shape = Shape(2, 1, size=size)
    skeleton = compile_skeleton(Renderer(processor, model.config), shape)
    rows = assemble(skeleton, [[(300,), (301, 302)]], [[(), ()]], [[0, 1, 0]], pad=0)
    inputs = model_inputs(model, rows, pixels(processor, drawn, 3))
    with torch.no_grad():
        apart = model(**inputs).logits
        with together(model):
            joint = model(**inputs).logits
        after = model(**inputs).logits
    assert torch.equal(apart, after)  # nothing stays behind
    assert torch.allclose(apart, joint, atol=1e-5)  # float32; the sums run in another order


def test_a_stripped_prompt_keeps_pictures_labels_and_the_end_of_a_label() -> None:
    glue = ((9, 1, 2, 7, 7, 3, 9, 5), (4, 9, 2, 7, 3, 5), (4,))
    lean = strip_template(Skeleton(glue, (("label", 0), ("label", 1))), image_id=7)
    assert lean.glue == ((7, 7), (4, 7), (4,))
    assert lean.slots == (("label", 0), ("label", 1))
    partly = strip_template(Skeleton(glue, (("label", 0), ("label", 1))), image_id=7, kept=2)
    assert partly.glue == ((1, 2, 7, 7, 9, 5), (4, 9, 2, 7, 3, 5), (4,))  # so much before each picture and each label
    assert strip_template(Skeleton(glue, (("label", 0), ("label", 1))), image_id=7, kept=99).glue == glue


def test_head_scores_agree_with_attention_read_by_hand() -> None:
    bench = small_bench()
    shape = Shape(2, 2, size=28)
    work = bench.episodes(shape, 4, random.Random(2), Generator().manual_seed(2))
    assert work.rows is not None
    assert work.order is not None
    scores = head_scores(bench.model, work)
    bench.model.set_attn_implementation("eager")
    with torch.no_grad():
        pattern = torch.stack(bench.model.model(**work.inputs, output_attentions=True).attentions, 1)
    row, rows, order = 1, work.rows, work.order
    query = int(rows.starts[row, -1]) - 1
    right = wrong = 0.0
    image = (rows.input_ids[row] == bench.model.config.image_token_id).nonzero()[:, 0].tolist()
    for item in range(shape.n_items - 1):
        mass = pattern[row, 2, 3, query, int(rows.starts[row, item]) : image[item + 1]].sum()  # the label and the close of its turn
        if order[row, item] == order[row, -1]:
            right += float(mass)
        else:
            wrong += float(mass)
    assert float(scores["induction"][row, 2, 3]) == pytest.approx(right - wrong, abs=1e-6)  # float32 sums
    own = [
        max(float(pattern[row, 0, 1, t, image[item]]) for t in range(int(rows.starts[row, item]), image[item + 1]))
        for item in range(shape.n_items - 1)
    ]
    assert float(scores["label to its item"][row, 0, 1]) == pytest.approx(sum(own) / len(own), abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", TRAINED[1:])
def test_the_causal_story_repeats_in_every_family(family: str, tmp_path: Path) -> None:
    """Minutes each: train an organism, find heads on one half of the episodes, switch them off on the other, beside random heads."""
    import mechicl
    from mechicl.analysis.study import find_and_prove
    from mechicl.data import concepts

    folder = train(family, preset="quick", out=tmp_path / family, threads=1, progress=False)
    study = find_and_prove(mechicl.load(folder), concepts.draw(96, classes=4, shots=2, size=28, seed=77), progress=False)
    assert study.accuracy.accuracy.value >= 0.75  # chance .25
    assert study.accuracy.zero_shot is not None
    assert study.accuracy.zero_shot.high < study.accuracy.accuracy.low
    proofs = [one.ablation for one in study.sets if one.ablation is not None]
    assert proofs, [one.verdict for one in study.sets]
    worst = min(proofs, key=lambda proof: proof.chosen.accuracy.value)
    assert worst.chosen.change.high < -0.2  # off, they cost a fifth of the answers at least, with certainty ...
    assert worst.chosen.accuracy.value < worst.random_mean.value  # ... and more than as many other heads
