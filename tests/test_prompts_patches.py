"""Image token -> pixel box, against the processors and vision towers themselves: change a few pixels, see which tokens change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.patches import Picture, image_boxes
from mechicl.prompts.render import Renderer
from mechicl.training.organisms import FAMILIES, build

SIZES = ((84, 84), (150, 70), (61, 133))
"""Square, wide and tall, none a multiple of anything."""


@torch.no_grad()
def without_mixing(family: str) -> tuple[Any, Any]:
    """A family whose vision attention adds nothing, so that every image token sees its own patch only."""
    model, processor = build(family)
    for name, module in model.named_modules():
        seen = "vision" in name or "visual" in name
        if seen and name.endswith((".out_proj", ".o_proj", "attn.proj", ".projection_layer")):
            for parameter in module.parameters():
                parameter.zero_()
    return model, processor


@torch.no_grad()
def embeddings(model: Any, batch: Any) -> torch.Tensor:
    """What enters the decoder at every position."""
    caught: list[torch.Tensor] = []
    decoder = model.get_decoder()
    handle = decoder.register_forward_pre_hook(lambda m, a, k: caught.append(k["inputs_embeds"]), with_kwargs=True)
    try:
        model(**batch.inputs)
    finally:
        handle.remove()
    return caught[0]


def noise(size: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 190, (size[1], size[0], 3), dtype=np.uint8)


def episode(*pictures: np.ndarray) -> Episode:
    shots = [Shot("dax" if k % 2 else "kimo", (Image.fromarray(p),)) for k, p in enumerate(pictures)]
    return Episode(tuple(shots[:-1]), shots[-1], ("dax", "kimo"))


def touched(pixels: np.ndarray, x: int, y: int, side: int = 4) -> np.ndarray:
    other = pixels.copy()
    patch = other[y : y + side, x : x + side].astype(int)
    other[y : y + side, x : x + side] = np.where(patch > 125, patch - 60, patch + 60)
    return other


@pytest.mark.parametrize("alone", [True, False], ids=["one picture", "three pictures"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mllama"])
def test_the_tokens_that_change_are_those_whose_box_holds_the_changed_pixels(family: str, alone: bool) -> None:
    model, processor = without_mixing(family)
    renderer = Renderer(processor, model.config)
    draw = np.random.default_rng(5)
    for size in SIZES if alone else SIZES[1:2]:
        pictures = [noise(size, 1)] if alone else [noise((60, 60), 2), noise(size, 1), noise((70, 90), 3)]
        which = 0 if alone else 1
        batch = renderer.render([episode(*pictures)])
        before = embeddings(model, batch)
        boxes = batch.patches[0][which]
        tokens = {int(p) for p in batch.mask("image", image=which)[0].nonzero()[:, 0]}
        assert boxes, f"{family}: no boxes at all"
        for _ in range(4):
            x, y = int(draw.integers(0, size[0] - 4)), int(draw.integers(0, size[1] - 4))
            changed_pictures = [touched(p, x, y) if k == which else p for k, p in enumerate(pictures)]
            after = embeddings(model, renderer.render([episode(*changed_pictures)]))
            changed = {int(p) for p in ((after - before)[0].abs().amax(-1) > 1e-5).nonzero()[:, 0]}
            assert changed <= tokens, "a token outside the picture changed"
            assert changed <= boxes.keys(), "a token without a place changed"
            inside = {p for p, (a, b, c, d) in boxes.items() if a < x + 3 and c > x + 1 and b < y + 3 and d > y + 1}
            assert inside <= changed or cropped(family, boxes, x, y)
            for p in changed:  # resampling spreads a pixel by at most three pixels of the coarser grid
                a, b, c, d = boxes[p]
                dx, dy = 2 + 3 * max(1.0, (c - a) / 14), 2 + 3 * max(1.0, (d - b) / 14)
                assert a - dx < x + 4 and c + dx > x and b - dy < y + 4 and d + dy > y, f"{family}: a token changed whose box {boxes[p]} is far from ({x}, {y})"


def cropped(family: str, boxes: Any, x: int, y: int) -> bool:
    """Whether the spot lies in what LLaVA cuts away."""
    return family == "llava" and not any(a <= x + 2 <= c and b <= y + 2 <= d for a, b, c, d in boxes.values())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("mllama", "llava")])
def test_the_boxes_of_the_tokens_cover_the_picture(family: str) -> None:
    model, processor = build(family)
    for size in SIZES:
        batch = Renderer(processor, model.config).render([episode(noise(size, 1))])
        held = np.zeros(size[::-1], dtype=int)
        for a, b, c, d in batch.patches[0][0].values():
            held[int(np.floor(b + 1e-3)) : int(np.ceil(d - 1e-3)), int(np.floor(a + 1e-3)) : int(np.ceil(c - 1e-3))] += 1
        assert held.min() >= 1


def test_a_family_without_known_geometry_gets_no_box_where_the_tokens_are_no_square() -> None:
    _, processor = build("paligemma")

    class Other:
        model_type = "a family nobody met"

    assert image_boxes(Picture(30, 20, 7, 1, 0, {}, processor, Other())) == []
    assert len(image_boxes(Picture(30, 20, 9, 1, 0, {}, processor, Other()))) == 9


def test_the_single_token_of_mllama_has_no_place() -> None:
    model, processor = build("mllama")
    batch = Renderer(processor, model.config).render([episode(noise((60, 60), 1), noise((60, 60), 2))])
    assert int(batch.mask("image").sum()) == 2
    assert [len(boxes) for boxes in batch.patches[0]] == [0, 0]
