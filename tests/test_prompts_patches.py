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


def check_boxes(
    model: Any, processor: Any, pictures: list[np.ndarray], which: int, *, spread: float = 3.0, move: float = 0.0, spots: int = 4
) -> int:
    """Changes a few pixels of one picture, several times; fails unless exactly the tokens whose boxes hold them change. Returns how many changed.

    `spread`: pixels of the token grid's resolution over which resampling spreads a pixel. `move`: shifts the boxes, for the negative control.
    """
    renderer = Renderer(processor, model.config)
    draw = np.random.default_rng(5)
    height, width = pictures[which].shape[:2]
    batch = renderer.render([episode(*pictures)])
    before = embeddings(model, batch)
    boxes = {p: (a + move, b, c + move, d) for p, (a, b, c, d) in batch.patches[0][which].items()}
    tokens = {int(p) for p in batch.mask("image", image=which)[0].nonzero()[:, 0]}
    assert boxes, "no boxes at all"
    total = 0
    for _ in range(spots):
        x, y = int(draw.integers(0, width - 4)), int(draw.integers(0, height - 4))
        other = [touched(p, x, y) if k == which else p for k, p in enumerate(pictures)]
        after = embeddings(model, renderer.render([episode(*other)]))
        changed = {int(p) for p in ((after - before)[0].abs().amax(-1) > 1e-5).nonzero()[:, 0]}
        total += len(changed)
        assert changed <= tokens, "a token outside the picture changed"
        assert changed <= boxes.keys(), "a token without a place changed"
        inside = {p for p, (a, b, c, d) in boxes.items() if a < x + 3 and c > x + 1 and b < y + 3 and d > y + 1}
        assert inside <= changed, "a token whose box holds the spot did not change"
        for p in changed:
            a, b, c, d = boxes[p]
            dx, dy = 2 + spread * max(1.0, (c - a) / 14), 2 + spread * max(1.0, (d - b) / 14)
            near = a - dx < x + 4 and c + dx > x and b - dy < y + 4 and d + dy > y
            assert near, f"a token changed whose box {boxes[p]} is far from ({x}, {y})"
    return total


@pytest.mark.parametrize("alone", [True, False], ids=["one picture", "three pictures"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "mllama"])
def test_the_tokens_that_change_are_those_whose_box_holds_the_changed_pixels(family: str, alone: bool) -> None:
    model, processor = without_mixing(family)
    for size in SIZES if alone else SIZES[1:2]:
        pictures = [noise(size, 1)] if alone else [noise((60, 60), 2), noise(size, 1), noise((70, 90), 3)]
        assert check_boxes(model, processor, pictures, 0 if alone else 1)


def test_boxes_in_the_wrong_place_would_be_noticed() -> None:
    model, processor = without_mixing("qwen2_5_vl")
    with pytest.raises(AssertionError, match="box"):
        check_boxes(model, processor, [noise((150, 70), 1)], 0, move=28.0)


def pan_and_scan(model: Any, processor: Any) -> None:
    processor.images_kwargs = {**processor.images_kwargs, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 28}


def no_splitting(model: Any, processor: Any) -> None:
    processor.image_processor.do_image_splitting = False


def six_tiles(model: Any, processor: Any) -> None:
    processor.image_processor.max_patches = 6


def no_tiles(model: Any, processor: Any) -> None:
    processor.images_kwargs = {"crop_to_patches": False}


def shrunk_grid(model: Any, processor: Any) -> None:
    processor.vision_aspect_ratio = model.config.vision_aspect_ratio = "anyres_max_1"


def wide_canvases(model: Any, processor: Any) -> None:
    processor.image_processor.image_grid_pinpoints = model.config.image_grid_pinpoints = [[28, 84], [84, 28], [112, 56], [28, 56]]


def padded_first(model: Any, processor: Any) -> None:
    processor.image_processor.do_pad = True


def larger_before_the_crop(model: Any, processor: Any) -> None:
    processor.image_processor.size = {"shortest_edge": 35}


def class_token_kept(model: Any, processor: Any) -> None:
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy = "full"


@pytest.mark.parametrize(
    ("family", "setting", "spread"),
    [
        ("gemma3", pan_and_scan, 3.0),
        ("idefics3", no_splitting, 3.0),
        ("smolvlm", no_splitting, 3.0),
        ("internvl", six_tiles, 3.0),
        ("internvl", no_tiles, 3.0),
        ("llava_onevision", shrunk_grid, 14.0),  # the grid itself is interpolated: a cell reads its neighbours
        ("llava_onevision", wide_canvases, 3.0),
        ("llava_next", wide_canvases, 3.0),
        ("llava", padded_first, 3.0),
        ("llava", larger_before_the_crop, 3.0),
        ("llava", class_token_kept, 3.0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_boxes_follow_the_processor_settings(family: str, setting: Any, spread: float) -> None:
    model, processor = without_mixing(family)
    setting(model, processor)
    assert all(check_boxes(model, processor, [noise(size, 1)], 0, spread=spread) for size in SIZES[1:])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("mllama", "llava")])
def test_the_boxes_of_the_tokens_cover_the_picture(family: str) -> None:
    model, processor = build(family)
    for size in SIZES:
        batch = Renderer(processor, model.config).render([episode(noise(size, 1))])
        held = np.zeros(size[::-1], dtype=int)
        for a, b, c, d in batch.patches[0][0].values():
            held[int(np.floor(b + 1e-3)) : int(np.ceil(d - 1e-3)), int(np.floor(a + 1e-3)) : int(np.ceil(c - 1e-3))] += 1
        assert held.min() >= 1


def test_a_family_without_known_geometry_gets_no_box() -> None:
    _, processor = build("paligemma")

    class Other:
        model_type = "a family nobody met"

    assert image_boxes(Picture(30, 20, 7, 1, 0, {}, processor, Other())) == []
    assert image_boxes(Picture(30, 20, 9, 1, 0, {}, processor, Other())) == []  # none rather than wrong ones


def test_the_single_token_of_mllama_has_no_place() -> None:
    model, processor = build("mllama")
    batch = Renderer(processor, model.config).render([episode(noise((60, 60), 1), noise((60, 60), 2))])
    assert int(batch.mask("image").sum()) == 2
    assert [len(boxes) for boxes in batch.patches[0]] == [0, 0]
