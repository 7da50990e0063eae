"""The real processors of the families beyond the organisms: exact spans, as many image tokens as the model makes, boxes that hold their pixels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_prompts_patches import SIZES, check_boxes, noise

from mechicl.errors import OptionError, RenderError
from mechicl.models.families import FAMILIES, Family
from mechicl.models.probe import picture_probe
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.patches import GEOMETRY, Picture, image_boxes
from mechicl.prompts.render import Renderer
from mechicl.training.organisms import FAMILIES as ORGANISMS
from mechicl.training.organisms.every import EVERY, configuration, enlivened
from mechicl.training.organisms.every.processors import RECIPES, build_processor, build_whole, why_no_processor
from mechicl.training.organisms.every.shrink import SIDE
from mechicl.training.organisms.parts import padded
from mechicl.training.organisms.templates import chatml
from mechicl.training.tokenizer import build_tokenizer, token_id

recipes = pytest.mark.parametrize("family", RECIPES)


CODED = ("chameleon", "emu3")
"""Codes of pictures need not change with a few pixels: tests/test_coded_pictures.py."""


def episodes(family: str = "") -> list[Episode]:
    """Two prompts of different length: three pictures and one; of one size where pictures of several are refused."""
    from PIL import Image

    a, b, c = (Image.fromarray(noise(SIZES[0] if family == "emu3" else size, k)) for k, size in enumerate(SIZES))
    shots = (Shot("dax", (a,)), Shot("kimo tepa", (b,)))
    query = Shot("dax", (c,))
    return [Episode(shots, query, ("dax", "kimo tepa")), Episode((), query, ("dax", "kimo tepa"))]


@torch.no_grad()
def without_mixing(family: str) -> tuple[Any, Any]:
    """A family whose vision attention adds nothing and whose convolutions do not overlap, so that every image token sees its own patch only."""
    model, processor = build_whole(family)
    for name, module in model.named_modules():
        seen = any(word in name for word in ("vision", "visual", "image_tower"))
        if seen and name.endswith((".out_proj", ".o_proj", ".projection_layer", "attn.proj")):
            for parameter in module.parameters():
                parameter.zero_()
        if isinstance(module, torch.nn.Conv2d):
            keep_own_cell(module)
    return model, processor


def keep_own_cell(conv: torch.nn.Conv2d) -> None:
    """Nothing is read beyond the stride x stride inputs that are an output's own."""
    kept = torch.zeros(conv.kernel_size)
    (top, left), (tall, wide) = ((0, 0) if isinstance(conv.padding, str) else conv.padding), conv.stride  # "valid" is the only word in use
    kept[top : top + tall, left : left + wide] = 1
    conv.weight.mul_(kept)


@recipes
def test_labels_decode_to_themselves_and_the_model_takes_what_the_processor_gives(family: str) -> None:
    model, processor = build_whole(family)
    renderer = Renderer(processor, model.config)
    hooked = HookedVLM(model, processor)  # its load-time check goes through the processor too
    batch = renderer.render(episodes(family))
    found = [span for span in batch.spans[0] if span.role == "label"]
    decoded = [renderer.tokenizer.decode(batch.inputs["input_ids"][0, s.start : s.stop].tolist()).strip() for s in found]
    assert decoded == ["dax", "kimo tepa"]
    for row in range(2):
        spans = sorted(batch.spans[row], key=lambda s: s.start)
        assert [s.start for s in spans[1:]] == [s.stop for s in spans[:-1]]  # every position has one role
    alone = renderer.render(episodes(family)[1:])
    if FAMILIES.get(family, Family()).padding:
        with pytest.raises(OptionError, match="batch_size=1"):  # rather than logits that padding has moved
            hooked(batch)
        return
    with torch.no_grad():
        together, single = hooked(batch), hooked(alone)
    may = single[0] > -1e30  # Chameleon may not say a code: its logit is the smallest number there is
    off = (together[1] - single[0])[may.expand_as(together[1])].abs().max()
    assert float(off) <= 1e-4 * float(single[0][may].abs().max())  # left padding changes nothing


@pytest.mark.parametrize("family", [family for family in RECIPES if family not in CODED])
def test_the_tokens_that_change_are_those_whose_box_holds_the_changed_pixels(family: str) -> None:
    model, processor = without_mixing(family)
    if family not in GEOMETRY:  # no boxes rather than wrong ones
        batch = Renderer(processor, model.config).render(episodes()[1:])
        assert not any(batch.patches[0])
        return
    for size in SIZES:
        assert check_boxes(model, processor, [noise(size, 1)], 0)
    assert check_boxes(model, processor, [noise((60, 60), 2), noise(SIZES[1], 1), noise((70, 90), 3)], 1)


@pytest.mark.parametrize(
    ("family", "options", "size"),
    [
        ("step3p7", {}, (30, 28)),  # not cut
        ("step3p7", {}, (31, 17)),  # small and long: cut by its short side
        ("step3p7", {}, (140, 30)),  # a strip, padded to a square
        ("unlimited_ocr", {}, (30, 22)),  # not cut
        ("unlimited_ocr", {"crop_to_patches": False}, (84, 60)),  # stretched, not padded
        ("kimi_k25", {}, (30, 21)),  # padded only
        ("kimi_k25", {"size": {"max_height": 6, "max_width": 6}}, (84, 60)),
        ("inkling_mm_model", {"rescale_image_frac": None}, (32, 22)),  # a column of padding
        ("granite_docling", {"fine_route": True}, (150, 70)),  # four times the tokens
        ("granite_docling", {"max_patches": 1}, (61, 133)),  # not cut
        ("gemma4", {}, (30, 300)),  # so long that a side is one cell
        ("gemma4_unified", {}, (300, 30)),
        ("inkling2", {}, (16, 33)),  # nearly nothing but padding in the last row
    ],
)
def test_boxes_hold_where_a_familys_picture_takes_another_way(family: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    model, processor = without_mixing(family)
    for name, value in options.items():
        setattr(processor.image_processor, name, value)
    assert check_boxes(model, processor, [noise(size, 1)], 0)


def test_got_ocr_2_has_no_boxes_where_pictures_are_cut_too() -> None:
    model, processor = build_whole("got_ocr2")
    assert all(len(boxes) == 16 for boxes in Renderer(processor, model.config).render(episodes()[:1]).patches[0])
    processor.images_kwargs = {**processor.images_kwargs, "crop_to_patches": True, "max_patches": 3}
    batch = Renderer(processor, model.config).render(episodes()[:1])
    assert int(batch.mask("image").sum()) > 3 * 16
    assert not any(boxes for boxes in batch.patches[0] if len(boxes) != 16)


@pytest.mark.parametrize(("family", "frames"), [("instructblip", 1), ("instructblipvideo", 4)])
def test_a_family_whose_processor_puts_its_one_picture_first_is_hooked_but_refuses_episodes(family: str, frames: int) -> None:
    import transformers

    kind, pictures, token = {
        1: (transformers.InstructBlipProcessor, transformers.BlipImageProcessor, "image"),
        4: (transformers.InstructBlipVideoProcessor, transformers.InstructBlipVideoVideoProcessor, "video"),
    }[frames]
    words, asked = (build_tokenizer(eos="<|im_end|>", pad="<|endoftext|>") for _ in range(2))
    processor = kind(pictures(size={"height": SIDE, "width": SIDE}), words, asked, num_query_tokens=4)
    n = padded(len(words))
    config = configuration(family, vocabulary=n, ids={f"{token}_token_index": token_id(words, f"<{token}>")})
    config.qformer_config.vocab_size = n
    model = HookedVLM(enlivened(config, 0), processor)  # its load-time check goes through the processor
    assert model(picture_probe(processor)).isfinite().all()
    with pytest.raises(RenderError, match="before the whole prompt"):
        model.render(episodes())


def test_blip_2_with_a_number_of_query_tokens_puts_its_one_picture_first_and_is_told_how_not_to() -> None:
    model, processor = build_whole("blip-2")
    assert len(Renderer(processor, model.config).render(episodes()[:1]).patches[0]) == 3
    processor.num_query_tokens, processor.chat_template = 4, None  # as checkpoints have it
    whole = HookedVLM(model, processor)
    assert whole(picture_probe(processor)).isfinite().all()
    with pytest.raises(RenderError, match=r"num_query_tokens to None .* 4 times for each picture"):
        whole.render(episodes())


def test_fuyu_whose_processor_puts_its_one_picture_first_refuses_episodes() -> None:
    import transformers

    words = build_tokenizer(eos="<|im_end|>", pad="<|endoftext|>", extra=("|SPEAKER|", "|NEWLINE|"))
    processor = transformers.FuyuProcessor(transformers.FuyuImageProcessor(), words)
    _, (text,), *_ = processor.prepare_inputs_layout(images=[list(episodes()[0].images)], text=["dax"])
    assert text.startswith("|SPEAKER|dax")
    assert text.count("|SPEAKER|") == 1  # of three pictures
    with pytest.raises(RenderError, match="before the whole prompt"):
        Renderer(processor, configuration("fuyu"))


def test_what_a_processor_throws_away_is_heard_once_and_nothing_is_left_on_it() -> None:
    model, processor = build_whole("nemotron_h_omni")
    batch = Renderer(processor, model.config).render(episodes())
    assert {span.image for span in batch.spans[0] if span.role == "image"} == {0, 1, 2}
    assert "get_text_with_replacements" not in vars(processor)


@pytest.mark.parametrize("split", [False, True])
def test_neighbouring_pictures_that_share_a_fence_have_each_their_own_tokens(split: bool) -> None:
    model, processor = build_whole("idefics2")
    processor.image_processor.do_image_splitting = split
    a, b, c = episodes()[0].images
    together = Episode((Shot("dax", (a, b)),), Shot("kimo tepa", (c,)), ("dax", "kimo tepa"), question="Which")
    batch = Renderer(processor, model.config).render([together])
    assert [int(batch.mask("image", image=k).sum()) for k in range(3)] == [20 if split else 4] * 3
    assert model(**batch.inputs).logits.isfinite().all()


def test_a_template_that_writes_a_pictures_tokens_itself_must_write_as_many_for_each() -> None:
    model, processor = build_whole("pp_chart2table")
    none = chatml("<img></img>")
    for template in (none, 4 * "<imgpad>" + none):  # none, four for three pictures
        with pytest.raises(RenderError, match="as many for each"):
            Renderer(processor, model.config, chat_template=template).render(episodes()[:1])


def test_a_family_nobody_described_gets_no_boxes_even_where_its_tokens_are_a_square() -> None:
    from types import SimpleNamespace

    picture = Picture(50, 40, 16, 1, 0, {}, SimpleNamespace(image_processor=None), SimpleNamespace(model_type="new"))
    assert image_boxes(picture) == []


def test_where_pictures_may_be_cut_into_tiles_a_square_of_tokens_gets_no_boxes() -> None:
    from types import SimpleNamespace

    inputs = {"target_sizes": torch.tensor([[8, 8]])}
    for kind, option in (("cohere2_vision", "crop_to_patches"), ("ovis2", "crop_to_patches"), ("minicpmv4_6", "slice_mode")):
        for on, n in ((False, 16), (True, 0)):
            processor = SimpleNamespace(image_processor=SimpleNamespace(**{option: on}))
            assert len(image_boxes(Picture(50, 40, 16, 1, 0, inputs, processor, SimpleNamespace(model_type=kind)))) == n


def test_every_family_has_a_processor_or_a_reason() -> None:
    for family in EVERY:
        if family in RECIPES or family in ORGANISMS:
            assert why_no_processor(family) == ""
        else:
            assert len(why_no_processor(family)) > 10
    with pytest.raises(OptionError, match="shieldgemma2"):
        build_processor("shieldgemma2")
