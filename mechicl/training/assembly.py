"""Few-shot prompts by the thousand: a prompt's skeleton is rendered once, then labels and words are written into its slots.

Rendering an episode through a processor takes milliseconds; training needs thousands of episodes a minute. Episodes of one `Shape` differ only
in their labels' and words' tokens and in their pixels, so the `Renderer` renders one of them, its spans say where the slots are, and the rest
is concatenation of lists. A test holds the result equal to the Renderer's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor

from mechicl.errors import RenderError
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.spans import QUERY

if TYPE_CHECKING:
    from mechicl.prompts.batch import Batch, Renders

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """What episodes of a training batch have in common.

    `size`: side of the pictures in pixels, 0 for items without a picture. `words`: items carry a word. Counts `n_classes`, `n_shots` (per class).
    `lean`: without the chat template, three times as many pictures for the same tokens; `kept`: but for so many of its tokens before each picture and
    each label (see `strip_template`).
    """

    n_classes: int
    n_shots: int
    size: int = 28
    words: bool = False
    instruction: str = ""
    question: str = ""
    lean: bool = False
    kept: int = 0

    @property
    def n_items(self) -> int:
        """Exemplars and the query."""
        return self.n_classes * self.n_shots + 1


@dataclass(frozen=True)
class Skeleton:
    """A rendered prompt with its labels and words taken out.

    `glue` has one piece more than `slots`: glue[0] slots[0] glue[1] ... The last slot is the answer's, `glue[-1]` what ends an answer.
    A slot is (role, item), item counted from 0 with the query last.
    """

    glue: tuple[Tokens, ...]
    slots: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Rows:
    """Token rows with their label slots.

    Attributes:
        input_ids, attention_mask: [batch, pos], padded on the left.
        starts, stops: [batch, item], where each item's label stands (the last: the answer, which ends the row).
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    starts: Int[Tensor, "batch item"]
    stops: Int[Tensor, "batch item"]


def example(shape: Shape, labels: Sequence[str], words: Sequence[str], pictures: Sequence[Image.Image], order: Sequence[int]) -> Episode:
    """The episode of a shape, as any user would write it. `labels`, `words` by class; `pictures`, `order` (classes) by item, query last."""
    items = [
        Shot(
            label=labels[c],
            images=(pictures[i],) if shape.size else (),
            text=words[c] if shape.words else "",
            item=f"class {c}",
        )
        for i, c in enumerate(order)
    ]
    return Episode(
        shots=tuple(items[:-1]), query=items[-1], candidates=tuple(labels), instruction=shape.instruction, question=shape.question
    )


def compile_skeleton(renderer: Renders, shape: Shape, closing: Tokens | None = None) -> Skeleton:
    """Render one episode of a shape and take it apart at its spans.

    Args:
        closing: Tokens that end an answer; by default what follows the first exemplar's label, up to and with its first special token.

    Raises:
        RenderError: labels or words were not found where they were put.
    """
    labels = [f"ba{'du' * (c + 1)}" for c in range(shape.n_classes)]
    words = [f"zi{'po' * (c + 1)}" for c in range(shape.n_classes)]
    order = [c for _ in range(shape.n_shots) for c in range(shape.n_classes)] + [0]
    blank = Image.new("RGB", (shape.size or 1, shape.size or 1))
    batch: Batch = renderer.render([example(shape, labels, words, [blank] * len(order), order)])
    ids = batch.inputs["input_ids"][0].tolist()
    glue: list[Tokens] = []
    slots: list[tuple[str, int]] = []
    last, at = 0, 0
    last = next((span.stop for span in batch.spans[0] if span.role == "pad" and span.start == 0), 0)
    for span in batch.spans[0]:
        if span.role in ("label", "text"):
            glue.append(tuple(ids[last : span.start]))
            slots.append((span.role, shape.n_items - 1 if span.shot == QUERY else span.shot))
            last = span.stop
        at = span.stop
    expected = (shape.n_items - 1) + shape.n_items * shape.words
    if len(slots) != expected or at != len(ids):
        raise RenderError(f"a prompt of {shape} must have {expected} label and word spans; got {len(slots)}. Check the chat template.")
    glue.append(tuple(ids[last:]))
    slots.append(("label", shape.n_items - 1))
    if closing is None:
        first = slots.index(("label", 0))
        closing = glue[first + 1][:1] if len(glue) > first + 1 else ()
    return Skeleton((*glue, tuple(closing)), tuple(slots))


def strip_template(skeleton: Skeleton, image_id: int, kept: int = 0) -> Skeleton:
    """A prompt without its chat template: item, label, what ends a label, item, label, ...

    A label directly behind its item is where the circuit of repeated sequences (look at the token before; look for an equal one) already works, so
    this is where a model learns to use it for pictures. Never what a user's prompt looks like. `kept`: how many of the template's tokens stay before each
    picture and before each label, so that the way between the two can grow.
    """
    closing = skeleton.glue[-1]
    pieces: list[Tokens] = []
    for k, piece in enumerate(skeleton.glue[:-1]):
        behind_label = k > 0 and skeleton.slots[k - 1][0] == "label"
        pieces.append((closing if behind_label else ()) + _sparse(piece[len(closing) if behind_label else 0 :], image_id, kept))
    return Skeleton((*pieces, closing), skeleton.slots)


def _sparse(piece: Tokens, image_id: int, kept: int) -> Tokens:
    """A piece's picture tokens, and the last `kept` of the others before the picture and behind it."""
    at = [i for i, token in enumerate(piece) if token == image_id]
    first, behind = (at[0], at[-1] + 1) if at else (0, 0)
    stays = {*at, *range(max(0, first - kept), first), *range(max(behind, len(piece) - kept), len(piece))}
    return tuple(token for i, token in enumerate(piece) if i in stays)


def assemble(
    skeleton: Skeleton,
    labels: Sequence[Sequence[Tokens]],
    words: Sequence[Sequence[Tokens]],
    order: Sequence[Sequence[int]],
    *,
    pad: int,
    answer: bool = True,
) -> Rows:
    """Write labels and words into a skeleton, one row per episode.

    Args:
        labels, words: For each episode and class the tokens (words may be empty where the skeleton has no word slot).
        order: For each episode the class of every item, the query's last.
        pad: The token put on the left.
        answer: End the row with the answer and the closing tokens (training); else with the prompt (the last label span is then empty).
    """
    rows, spans = [], []
    for names, texts, classes in zip(labels, words, order, strict=True):
        row: list[int] = []
        here = []
        last = len(skeleton.slots) - 1
        for k, (role, item) in enumerate(skeleton.slots):
            row += skeleton.glue[k]
            if role == "text":
                row += texts[classes[item]]
                continue
            start = len(row)
            if k < last or answer:
                row += names[classes[item]]
            here.append((start, len(row)))
        if answer:
            row += skeleton.glue[-1]
        rows.append(row)
        spans.append(here)
    width = max(map(len, rows))
    lead = torch.tensor([width - len(row) for row in rows])
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    bounds = torch.tensor(spans) + lead[:, None, None]
    mask = (torch.arange(width)[None] >= lead[:, None]).long()
    return Rows(ids, mask, bounds[..., 0], bounds[..., 1])


def targets(rows: Rows, order: Int[Tensor, "batch item"]) -> Bool[Tensor, "batch pos"]:
    """Tokens that can be known from the examples: labels (and what ends them) of classes already shown, the answer included."""
    seen = (order[:, :, None] == order[:, None, :]).tril(-1).any(-1)  # class shown at an earlier item
    at = torch.arange(rows.input_ids.shape[1])[None, None]
    inside = (at >= rows.starts[..., None]) & (at <= rows.stops[..., None])
    return (inside & seen[..., None]).any(1)


def pixels(processor: Any, pictures: UInt8[Tensor, "n 3 height width"], per_row: int) -> dict[str, Any]:
    """The image processor's own output for pictures that stand `per_row` to a prompt."""
    images: Any = list(pictures)
    if "Idefics3" in type(processor).__name__ or "SmolVLM" in type(processor).__name__ or "Mllama" in type(processor).__name__:
        images = [images[i : i + per_row] for i in range(0, len(images), per_row)]
    out = processor.image_processor(images=images, return_tensors="pt")
    return {name: value for name, value in out.items() if name not in ("num_patches", "num_crops", "rows", "cols")}


def model_inputs(model: Any, rows: Rows, picture: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a family's forward needs: tokens, mask, pixels, and which tokens are picture tokens."""
    config = model.config
    inputs: dict[str, Any] = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, **picture}
    if picture or config.model_type in ("gemma3", "paligemma"):
        kind = (rows.input_ids == image_token(config)).long()
        if config.model_type in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            inputs["mm_token_type_ids"] = kind
        elif config.model_type in ("gemma3", "paligemma"):
            inputs["token_type_ids"] = kind
    return inputs


def image_token(config: Any) -> int:
    """The token that stands for a piece of a picture."""
    found = getattr(config, "image_token_id", None)
    return int(found if found is not None else config.image_token_index)
