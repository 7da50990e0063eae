"""Families that turn a picture into words of a codebook (Chameleon, Emu3): where each code stands, and what pictures of several sizes do to each other.

A small change need not change a code, so these are shown two tones: codes whose place lies within one tone are all the same, and the tones' codes differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_every_family_processors import without_mixing
from test_prompts_patches import SIZES, episode, noise

import mechicl
from mechicl.errors import PaddingError
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.render import Renderer
from mechicl.training.organisms.every.processors import build_whole

CODED = ("chameleon", "emu3")


@torch.no_grad()
def without_neighbours(family: str) -> tuple[Any, Any]:
    """A family whose quantiser's encoder reads, for each code, the pixels of its own cell only (and the picture's mean and spread)."""
    model, processor = without_mixing(family)
    for name, module in model.model.vqmodel.encoder.named_modules():
        if name.endswith((".out_proj", ".proj_out")):
            for parameter in module.parameters():
                parameter.zero_()
        if isinstance(module, torch.nn.Conv3d) and module.kernel_size[-1] == 3:
            kept = torch.zeros(3, 3)
            kept[1, 1] = 1
            module.weight.mul_(kept)
    model.model.vqmodel.quantize.register_forward_pre_hook(lambda quantiser, args: fit(quantiser, args[0]))
    return model, processor


@torch.no_grad()
def fit(quantiser: Any, coded: torch.Tensor) -> None:
    """A codebook made of what there is to code, so that what differs has different codes."""
    rows = coded.movedim(-3, -1).flatten(0, -2)
    quantiser.embedding.weight.copy_(rows[torch.linspace(0, len(rows) - 1, len(quantiser.embedding.weight)).long()])


def two_tones(size: tuple[int, int], rectangle: tuple[int, int, int, int]) -> np.ndarray:
    """Dark, with a bright rectangle (left, top, right, bottom)."""
    left, top, right, bottom = rectangle
    pixels = np.full((size[1], size[0], 3), (200, 40, 20), dtype=np.uint8)
    pixels[top:bottom, left:right] = (20, 90, 230)
    return pixels


def tones(
    model: Any, processor: Any, pixels: np.ndarray, rectangle: tuple[int, int, int, int], *, move: float = 0.0
) -> tuple[set[Any], set[Any]]:
    """The embeddings of codes within the bright rectangle and of those without, those at its edge left out. `move`: shifts the boxes, for the control."""
    others = [noise((40, 30), 2), pixels, noise((30, 50), 3)]
    batch = Renderer(processor, model.config).render([episode(*others)])
    given = {name: batch.inputs[name] for name in ("pixel_values", "image_sizes") if name in batch.inputs}
    entered = list(model.model.get_image_features(**given).pooler_output)[1]
    left, top, right, bottom = rectangle
    inside: set[Any] = set()
    outside: set[Any] = set()
    first = min(int(p) for p in batch.mask("image", image=1)[0].nonzero()[:, 0])
    for pos, (a, b, c, d) in batch.patches[0][1].items():
        a, b, c, d = a + move, b + move, c + move, d + move
        edge = 0.8 * max(c - a, d - b)  # resampling mixes the tones there
        code = tuple(np.round(entered[pos - first].detach().numpy(), 4))
        if a > left + edge and c < right - edge and b > top + edge and d < bottom - edge:
            inside.add(code)
        elif c < left - edge or a > right + edge or d < top - edge or b > bottom + edge:
            outside.add(code)
    return inside, outside


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", CODED)
def test_codes_whose_place_lies_within_one_tone_are_the_same_and_the_tones_differ(family: str, size: tuple[int, int]) -> None:
    model, processor = without_neighbours(family)
    width, height = size
    rectangle = (width // 2, 0, width, height) if width >= height else (0, height // 2, width, height)
    pixels = two_tones(size, rectangle)
    inside, outside = tones(model, processor, pixels, rectangle)
    assert len(inside) == len(outside) == 1
    assert inside != outside
    inside, outside = tones(model, processor, pixels, rectangle, move=-0.3 * max(size))  # were the boxes elsewhere, it would be seen
    assert len(inside | outside) > 2 or inside & outside or not (inside and outside)


def test_emu3_codes_a_picture_on_a_canvas_as_large_as_the_batchs_largest_so_other_sizes_in_the_batch_are_refused() -> None:
    model, processor = build_whole("emu3")
    renderer = Renderer(processor, model.config)
    small, large = episode(noise((60, 60), 1)), episode(noise((150, 70), 2))
    with pytest.raises(PaddingError, match="largest picture"):
        renderer.render([small, large])
    for rows in ([small], [large], [small, small], [episode(noise((60, 60), 1), noise((150, 70), 2))]):
        assert renderer.render(rows)
    both = processor.image_processor([Image.fromarray(noise((60, 60), 1)), Image.fromarray(noise((150, 70), 2))], return_tensors="pt")
    alone = processor.image_processor([Image.fromarray(noise((60, 60), 1))], return_tensors="pt")
    codes = [model.model.get_image_tokens(x["pixel_values"], x["image_sizes"]) for x in (both, alone)]
    assert not torch.equal(codes[0][: len(codes[1])], codes[1])  # what the refusal is for


def test_an_analysis_runs_emu3s_prompts_one_at_a_time_where_their_pictures_differ_in_size() -> None:
    model, processor = build_whole("emu3")
    hooked = HookedVLM(model, processor, check=False)
    rows = [episode(*(noise(size, k) for k in range(3))) for size in ((60, 60), (150, 70))]
    together = mechicl.icl_accuracy(hooked, rows, batch_size=8, progress=False)
    assert np.allclose(together.margins, mechicl.icl_accuracy(hooked, rows, batch_size=1, progress=False).margins, atol=1e-5)
    assert any("Padding moves" in note for note in together.notes)
