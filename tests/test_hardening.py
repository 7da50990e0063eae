"""Strange text, strange templates, broken pictures, broken numbers, models of one layer and one head: a right answer or a clear refusal, never a guess."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import mechicl
from mechicl.data import concepts
from mechicl.data.memes_check import open_picture
from mechicl.errors import ContextLengthError, EpisodeError, HeadIndexError, ImageError, NotFiniteError, OptionError, RenderError
from mechicl.models.toys.config import toy_config
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.corrupt import minimal_pairs
from mechicl.prompts.episode import Episode, Shot, check_pictures
from mechicl.prompts.render import Renderer
from mechicl.training.organisms import build

Organism = Callable[..., tuple[Any, Any]]
QUIET: dict[str, Any] = {"progress": False}

STRANGE = {
    "right to left": "שלום عليكم", "emoji of several parts": "👩‍👩‍👧", "combining": "é ñ", "bidirectional controls": "\u202edax\u202c", "zero width": "da\u200dx",
    "no-break space": "da\u00a0x", "full width": "ｄａｘ", "NUL": "da\0x", "newline": "da\nx", "carriage return": "da\r\nx", "tab": "da\tx",
    "jinja": "{{ 7 * 7 }}{% raw %}", "HTML": "</script><b onclick=x>", "escape sequence": "\x1b[31mdax", "astral": "𝔡𝔞𝔵", "not a character": "da\ufffex",
}  # fmt: skip
REFUSED = {
    "turn ends": "<|im_end|>", "picture, Qwen": "<|image_pad|>", "picture, LLaVA": "<image>", "turn ends, Gemma": "<end_of_turn>", "picture, Gemma": "<image_soft_token>",
    "end of text": "</s>", "inside a word": "da<image>x", "the renderer's own marks": "\U000f0000x", "half a character": "da\ud800x", "longer than the context": "dax" * 3000,
}  # fmt: skip


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8))


def strange(text: str, where: str) -> Episode:
    label = text if where == "label" else "dax"
    shots = (Shot(label, (picture(0),)), Shot("kimo", (picture(1),)))
    return Episode(
        shots,
        Shot(label, (picture(2),)),
        (label, "kimo"),
        text if where == "instruction" else "",
        text if where == "question" else "What?",
    )


def read_back(renderer: Renderer, one: Episode, where: str) -> list[str]:
    """What the tokens of every span of a role say."""
    batch = renderer.render([one])
    assert int((batch.inputs["input_ids"] == renderer.image_token_id).sum()) == int(batch.mask("image").sum())
    spans = [span for span in batch.spans[0] if span.role == where]
    return [renderer.tokenizer.decode(batch.inputs["input_ids"][0, s.start : s.stop].tolist()).strip() for s in spans]


@pytest.mark.parametrize("where", ["label", "question", "instruction"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "gemma3"])
def test_strange_text_stays_what_it_is(kind: str, where: str, organism: Organism) -> None:
    model, processor = organism(kind)
    renderer = Renderer(processor, model.config)
    for name, text in STRANGE.items():
        found = read_back(renderer, strange(text, where), where)
        assert found[0] == text.strip(), name


@pytest.mark.filterwarnings("ignore:Token indices sequence length")
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava", "gemma3"])
def test_text_that_would_act_on_the_prompt_is_refused_or_means_nothing_to_this_family(kind: str, organism: Organism) -> None:
    model, processor = organism(kind)
    renderer = Renderer(processor, model.config)
    acts = set(renderer.tokenizer.all_special_tokens) | set(renderer.tokenizer.get_added_vocab())
    for name, text in REFUSED.items():
        special = any(token in text for token in acts)
        if special or "<" not in text:
            with pytest.raises((RenderError, EpisodeError, ContextLengthError)):
                renderer.render([strange(text, "label")])
        else:
            assert read_back(renderer, strange(text, "label"), "label")[0] == text, name


GLUE = st.text(st.sampled_from("abc [](){}.:\n§é中"), min_size=1, max_size=6)
LABELS = st.sampled_from(["dax", "user", "a", "abc"])
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def chat_template(before: str, after: str, *, trims: bool = False, turn: str = "", prompt: str = "") -> str:
    """`before`, the role, `turn`, what is said (stripped if `trims`) and `after`, turn by turn; a prompt ends with `before`, "assistant" and `prompt`."""
    # as values: beside its blocks Jinja takes line breaks and spaces away
    before, after, turn, prompt = ("{{ '" + text.replace("\n", "\\n") + "' }}" for text in (before, after, turn, prompt))
    said = "part.text | trim" if trims else "part.text"
    return (
        "{% for m in messages %}" + before + "{{ m.role }}" + turn + "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{% if part.type == 'image' %}" + PICTURE + "{% else %}{{ " + said + " }}{% endif %}{% endfor %}{% endif %}" + after + "{% endfor %}"
        "{% if add_generation_prompt %}" + before + "assistant" + prompt + "{% endif %}"
    )  # fmt: skip


@pytest.mark.parametrize(("turn", "prompt"), [("\n", "\n"), (":", ":"), (": ", ":"), (" ", ""), ("]\n\n", "]\n\n")])
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(before=GLUE, after=GLUE, trims=st.booleans(), label=LABELS)
def test_roles_are_exact_in_any_template(
    organism: Organism, turn: str, prompt: str, before: str, after: str, trims: bool, label: str
) -> None:
    """Templates of random words around every turn, some of which strip the text. Something parts a label from what stands around it, so none is refused."""
    model, processor = organism("qwen2_5_vl")
    template = chat_template(before, "\n" + after, trims=trims, turn=turn, prompt=prompt)
    renderer = Renderer(processor, model.config, chat_template=template)
    assert read_back(renderer, strange(label, "label"), "label")[0] == label


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(before=GLUE, after=GLUE, label=LABELS)
@example(before="a", after="\n", label="dax")
@example(before=":", after="a", label="user")
@example(before="\n", after=" \n", label="dax")
@example(before="中", after="中", label="abc")
def test_a_template_that_runs_into_its_labels_is_refused_if_the_tokenizer_joins_them(
    organism: Organism, before: str, after: str, label: str
) -> None:
    """Nothing parts a label from what stands around it: the tokenizer, asked apart, says whether a token holds a part of both."""
    model, processor = organism("qwen2_5_vl")
    start = f"{before}user{PICTURE}What?{after}"
    turns = [f"{before}assistant{name}{after}" for name in (label, "kimo")]
    text = "".join(start + turn for turn in turns) + f"{start}{before}assistant"
    edges = [len(start + before) + len("assistant"), len(start + turns[0] + start + before) + len("assistant")]
    edges = [(at, at + len(name)) for at, name in zip(edges, (label, "kimo"), strict=True)]
    assert [text[a:b] for a, b in edges] == [label, "kimo"]
    joined = any(crosses(processor.tokenizer, text, at) for pair in edges for at in pair)
    joined = joined or any(crosses(processor.tokenizer, text + name, len(text)) for name in (label, "kimo"))
    renderer = Renderer(processor, model.config, chat_template=chat_template(before, after))
    if joined:
        with pytest.raises(RenderError, match=r"tokens must stay the same|must belong to one piece|must say the label only"):
            renderer.render([strange(label, "label")])
    else:
        assert read_back(renderer, strange(label, "label"), "label")[0] == label


def crosses(tokenizer: Any, text: str, at: int) -> bool:
    """Does a token begin before character `at` and end behind it?"""
    return any(a < at < b for a, b in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])


@pytest.mark.parametrize("text", ["", " ", "\n", "\u3000"])
def test_a_label_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(EpisodeError):
        strange(text, "label")


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    picture().save(file, kind)
    return file.getvalue()


def opened(raw: bytes) -> Image.Image:
    return open_picture(io.BytesIO(raw), max_pixels=10**6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_damaged_pictures_are_a_picture_or_an_error_of_ours(kind: str, data: st.DataObject) -> None:
    raw = bytearray(saved(kind))
    for at in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=6)):
        raw[at] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(1, len(raw)))]
    with contextlib.suppress(ImageError):
        assert opened(bytes(raw)).mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_a_whole_picture_is_opened_and_half_of_one_is_not(kind: str) -> None:
    raw = saved(kind)
    assert opened(raw).size == (28, 28)
    with pytest.raises(ImageError):
        opened(raw[: len(raw) // 2])
    with pytest.raises(ImageError):
        opened(b"x" + raw[1:])
    if kind == "BMP":  # no checksum and no compression: one wrong byte is one wrong colour
        assert np.abs(np.asarray(opened(raw[:-1] + bytes([raw[-1] ^ 255])), dtype=int) - np.asarray(opened(raw), dtype=int)).sum() == abs(
            255 - 2 * raw[-1]
        )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "I;16", "F", "HSV"])
def test_pictures_of_every_mode_are_rendered(mode: str, organism: Organism) -> None:
    model, processor = organism("llava")
    one = Image.new("LA", (28, 28), (90, 255)).convert("RGBA").convert("PA") if mode == "PA" else Image.new(mode, (28, 28))
    episode = Episode((Shot("dax", (one,)), Shot("kimo", (picture(),))), Shot("dax", (one,)), ("dax", "kimo"))
    batch = Renderer(processor, model.config).render([episode])
    assert torch.isfinite(batch.inputs["pixel_values"]).all()


def test_a_picture_cut_off_on_disk_is_an_error_before_any_work(tmp_path: Any) -> None:
    picture().save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with Image.open(tmp_path / "a.png") as one, pytest.raises(ImageError, match=r"a\.png"):
        check_pictures([Episode((Shot("dax", (picture(),)), Shot("kimo", (picture(),))), Shot("dax", (one,)), ("dax", "kimo"))])


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return concepts.draw(4, classes=2, shots=2, size=28, syllables=(2, 2), seed=0)


ANALYSES: dict[str, Callable[[Any, list[Episode]], Any]] = {
    "icl_accuracy": lambda m, e: mechicl.icl_accuracy(m, e, **QUIET),
    "score_heads": lambda m, e: mechicl.score_heads(m, e, **QUIET),
    "ablate": lambda m, e: mechicl.ablate(m, e, [(0, 0)], n_random=2, **QUIET),
    "kv_shift": lambda m, e: mechicl.kv_shift(m, e, **QUIET),
    "logit_lens": lambda m, e: mechicl.logit_lens(m, e, **QUIET),
    "direct_logits": lambda m, e: mechicl.direct_logits(m, e, **QUIET),
    "contrast_margin": lambda m, e: mechicl.contrast_margin(m, e, **QUIET),
    "patch": lambda m, e: mechicl.patch(m, minimal_pairs(m.renderer, e, "swap_labels"), **QUIET),
    "eap": lambda m, e: mechicl.eap(m, minimal_pairs(m.renderer, e, "swap_labels"), **QUIET),
    "path_patch": lambda m, e: mechicl.path_patch(m, minimal_pairs(m.renderer, e, "swap_labels"), **QUIET),
}


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "infinity"])
@pytest.mark.parametrize("name", ANALYSES)
def test_a_broken_weight_is_never_a_number_in_a_result(name: str, value: float, episodes: list[Episode]) -> None:
    model = mechicl.load("demo")
    with torch.no_grad():
        model.hf.get_decoder().layers[2].self_attn.o_proj.weight[0, 0] = value
    with pytest.raises(NotFiniteError, match="finite"):
        ANALYSES[name](model, episodes)


@pytest.mark.parametrize("name", ["icl_accuracy", "score_heads", "kv_shift"])
def test_float16_that_overflows_is_refused(name: str, episodes: list[Episode]) -> None:
    model = mechicl.load("demo")
    with torch.no_grad():
        model.hf.get_decoder().layers[1].mlp.down_proj.weight.mul_(3e6)
    model.hf.half()
    with pytest.raises(NotFiniteError, match="float32"):
        ANALYSES[name](model, episodes)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ANALYSES)
def test_a_model_of_one_layer_and_one_head_works(name: str, episodes: list[Episode]) -> None:
    hf, processor = build("llava", text={"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1})
    model = HookedVLM(hf, processor)
    assert (model.cfg.n_layers, model.cfg.n_heads) == (1, 1)
    assert ANALYSES[name](model, episodes) is not None


def test_no_heads_no_episodes_and_heads_that_do_not_exist_are_refused(episodes: list[Episode]) -> None:
    model = mechicl.load("demo")
    with pytest.raises(OptionError, match="n_heads"):
        toy_config(n_heads=0)
    with pytest.raises(HeadIndexError, match="at least one"):
        mechicl.ablate(model, episodes, [])
    for head in ((9, 0), (0, -1)):
        with pytest.raises(HeadIndexError, match="head must be"):
            mechicl.ablate(model, episodes, [head])
    with pytest.raises(EpisodeError, match="non-empty"):
        mechicl.score_heads(model, [])
