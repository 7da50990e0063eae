"""Fixtures that every test file may use: small models of each family, built once a session, and prompts with pictures for them.

The cached models are shared: a test that changes weights or configuration builds its own with `mechicl.training.organisms.build` (20 ms).
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; threads of notebooks and commands would spin in each other's way

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

from mechicl.models import probe
from mechicl.prompts.episode import Episode, Shot
from mechicl.training.organisms import FAMILIES, build

torch.set_num_threads(1)

SIZES = ((56, 56), (90, 60), (60, 84), (112, 56))
"""Width and height of the example pictures, in pixels: no two neighbours alike, square and not."""
LABELS = ("zuda", "kimo", "tepa", "voruli")


@contextmanager
def unchecked() -> Iterator[None]:
    """As a user runs it: annotations are not checked, so that a refusal of mechicl's own is met."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def gen(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def picture(width: int = 56, height: int = 56, *, seed: int = 0) -> Image.Image:
    """A picture of coloured blocks on noise."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
    left, top = int(draw.integers(0, width // 2)), int(draw.integers(0, height // 2))
    pixels[top : top + height // 2, left : left + width // 2] = draw.integers(0, 256, 3, dtype=np.uint8)
    return Image.fromarray(pixels)


def worded_episodes() -> list[Episode]:
    """Two episodes of three candidates: labels of several tokens, prompts of two lengths."""
    return [
        Episode(
            shots=(Shot("daxo", (probe.picture((56, 56), k),)), Shot("blicketo", (probe.picture((56, 56), k + 1),))),
            query=Shot("daxo", (probe.picture((56, 56), k + 2),)), candidates=("daxo", "blicketo", "wu"), question="What is this?" * (1 + k), id=str(k),
        )
        for k in range(2)
    ]  # fmt: skip


def pictures(n: int, *, seed: int = 0) -> list[Image.Image]:
    """n pictures of different sizes; the seed decides every one of them."""
    return [picture(*SIZES[k % len(SIZES)], seed=1000 * seed + k) for k in range(n)]


def messages(n: int) -> list[dict[str, Any]]:
    """n - 1 exemplars and a query, one picture each."""
    turns: list[dict[str, Any]] = []
    for k in range(n):
        turns.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "This is a"}]})
        if k < n - 1:
            turns.append({"role": "assistant", "content": [{"type": "text", "text": LABELS[k % len(LABELS)]}]})
    return turns


def prompt(processor: Any, n: int) -> str:
    """`messages(n)` through the chat template; for a family without one, the pictures first and the exemplars as lines."""
    if processor.chat_template is not None:
        return processor.apply_chat_template(messages(n), add_generation_prompt=True)
    lines = [f"This is a {LABELS[k % len(LABELS)]}" for k in range(n - 1)]
    return processor.image_token * n + "\n".join([*lines, "This is a"])


def encode(processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
    """The processor's whole mapping, left-padded, without a second first token where the template wrote one."""
    bos = processor.tokenizer.bos_token
    written = bos is not None and all(text.startswith(bos) for text in texts)
    batch = processor(
        images=[list(some) for some in images],
        text=list(texts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not written,
    )
    return dict(batch)


def example_inputs(processor: Any, *, images: int = 2, seed: int = 0) -> dict[str, Any]:
    """One prompt with `images` pictures of different sizes: the processor's mapping, whole, with its attention mask."""
    return encode(processor, [prompt(processor, images)], [pictures(images, seed=seed)])


def example_batch(processor: Any, *, images: Sequence[int] = (2, 1), seed: int = 0) -> dict[str, Any]:
    """Several prompts, left-padded to one length; prompt k has images[k] pictures (`seed` + k decides which)."""
    drawn = [pictures(n, seed=seed + k) for k, n in enumerate(images)]
    return encode(processor, [prompt(processor, n) for n in images], drawn)


@cache
def cached(family: str, preset: str, seed: int) -> tuple[Any, Any]:
    return build(family, preset=preset, seed=seed)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="session")
def organism() -> Callable[..., tuple[Any, Any]]:
    """organism(family, preset="tiny", seed=0) -> (model, processor), built once a session. Do not change what it returns."""

    def get(family: str, preset: str = "tiny", seed: int = 0) -> tuple[Any, Any]:
        return cached(family, preset, seed)

    return get


@pytest.fixture
def untyped() -> Iterator[None]:
    """`unchecked` for a whole test."""
    with unchecked():
        yield


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    return request.param
