"""Attention on the prompt's pictures: patches over their pixels.

Nothing here writes HTML: `picture_grid` lays out plain data, the templates draw it (and escape it); `overlay_picture` paints a picture for use outside a page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from mechicl.errors import HeadIndexError, ImageError, NotFiniteError, OptionError
from mechicl.results import Head, PromptView
from mechicl.views.words import name

THUMBNAIL = 320
"""Longest side of a picture in a page, pixels; boxes stay in the original's pixels."""


FAINT = 0.02
"""Attention of the brightest patch below which a row of pictures is not brightened further: nothing should not look like something."""

_GLOW = (207, 90, 20)


@dataclass(frozen=True)
class Patch:
    """An image token over its pixels: its position in the prompt and its box in the picture."""

    position: int
    left: float
    top: float
    width: float
    height: float
    share: float = 0.0
    glow: float = 0.0


@dataclass(frozen=True)
class Picture:
    """A picture with its patches. `uri` is a data: address; `kind` is "right", "wrong" or "query"."""

    index: int
    uri: str
    width: int
    height: int
    label: str
    kind: str
    patches: tuple[Patch, ...]
    share: float = 0.0

    @property
    def pixelated(self) -> bool:
        """Small pictures are drawn with sharp pixels."""
        return max(self.width, self.height) <= 64


def attention_row(view: PromptView, head: Head, dest: int | None = None) -> np.ndarray:
    """Attention of one token, by default the last, onto all tokens.

    Raises:
        HeadIndexError: nothing was kept for this head.
        OptionError: another row than the last is asked of a head without a pattern; or the row has another length than the prompt.
        NotFiniteError: the row holds a NaN or an infinity.
    """
    n = len(view.tokens)
    if dest is None and head in view.rows:
        row = np.asarray(view.rows[head], dtype=float)
    elif head in view.patterns:
        row = np.asarray(view.patterns[head], dtype=float)[-1 if dest is None else dest]
    elif head in view.rows:
        raise OptionError(
            f"dest must be the last token for head {name(head)}; got {dest}. Keep its whole pattern when the prompt view is made."
        )
    else:
        raise HeadIndexError(
            f"head must be one that was kept; got {name(head)}, kept {[name(h) for h in sorted({*view.rows, *view.patterns})]}. Ask for it earlier."
        )
    if row.shape != (n,):
        raise OptionError(f"attention must have one number per token ({n}); got {list(row.shape)}. Pass the row of this very prompt.")
    if not np.isfinite(row).all():
        raise NotFiniteError(
            f"attention of head {name(head)} must be finite; got {row[~np.isfinite(row)][0]}. Look for an overflow with `mechicl doctor`."
        )
    return row


def open_picture(data: bytes) -> Image.Image:
    """The picture in these bytes.

    Raises:
        ImageError: the bytes are not a picture.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ImageError(
            f"images must be PNG or JPEG bytes; got {len(data)} bytes that do not open. Save the pictures with PIL first."
        ) from error


def overlay_picture(
    view: PromptView, head: Head, image: int, *, dest: int | None = None, scale: float | None = None, size: int = 224
) -> Image.Image:
    """The picture in grey with each patch tinted by the attention it gets.

    Args:
        view: The prompt.
        head: The head that looks.
        image: Index of the picture in the prompt.
        dest: Token that reads; by default the last one (the one that predicts the answer).
        scale: Attention that gets the full tint; by default the largest patch of the prompt for this head.
        size: Longest side of the result, pixels.

    Returns:
        A new picture; patches without attention stay grey.

    Raises:
        OptionError: no such picture, or its patches are unknown.
    """
    if not 0 <= image < len(view.images) or not view.image_boxes[image]:
        raise OptionError(
            f"image must be one of the {len(view.images)} pictures with known patches; got {image}. Families without image tokens have none."
        )
    row = attention_row(view, head, dest)
    top = scale or max((float(row[p]) for box in view.image_boxes for p in box), default=0.0) or 1.0
    picture = open_picture(view.images[image])
    factor = size / max(picture.size)
    new = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    base = (
        picture.convert("L")
        .convert("RGB")
        .resize(new, Image.Resampling.NEAREST if max(picture.size) <= 64 else Image.Resampling.BICUBIC)
        .convert("RGBA")
    )
    glow = Image.new("RGBA", base.size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(glow)
    for position, box in view.image_boxes[image].items():
        left, upper, right, lower = (round(v * factor) for v in box)
        alpha = round(215 * min(1.0, float(row[position]) / top))
        draw.rectangle((left, upper, max(left, right - 1), max(upper, lower - 1)), fill=(*_GLOW, alpha))
    return Image.alpha_composite(base, glow).convert("RGB")


def _uri(picture: Image.Image) -> str:
    """The picture, shrunk, as a data: address. Small ones as PNG, photographs as JPEG."""
    out = io.BytesIO()
    if max(picture.size) <= 128:
        picture.save(out, "PNG")
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(out, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def pictures(view: PromptView, rows: Sequence[np.ndarray] | None = None) -> tuple[Picture, ...]:
    """Every picture of the prompt with its patches; with `rows` (one per picture) the attention each patch gets (`glow`: relative to the largest, at least `FAINT`)."""
    boxes = [view.image_boxes[k] if k < len(view.image_boxes) else {} for k in range(len(view.images))]
    shares = [{p: float(rows[k][p]) if rows is not None else 0.0 for p in box} for k, box in enumerate(boxes)]
    top = max(FAINT, *(v for share in shares for v in share.values()), 0.0)
    out = []
    for k, (data, box, share) in enumerate(zip(view.images, boxes, shares, strict=True)):
        picture = open_picture(data)
        width, height = picture.size
        shot = _shot(view, k)
        label = "" if not box else view.labels[min(box)]
        kind = "query" if shot == -1 else "right" if label == view.answer else "wrong"
        patches = tuple(Patch(p, x0, y0, x1 - x0, y1 - y0, share[p], share[p] / top) for p, (x0, y0, x1, y1) in sorted(box.items()))
        out.append(Picture(k, _uri(picture), width, height, label, kind, patches, sum(share.values(), 0.0)))
    return tuple(out)


def _shot(view: PromptView, image: int) -> int:
    """The shot a picture belongs to; -1 is the query (pictures without patches: the last one)."""
    box = view.image_boxes[image] if image < len(view.image_boxes) else {}
    return view.shots[min(box)] if box else (-1 if image == len(view.images) - 1 else -2)


@dataclass(frozen=True)
class OverlayRow:
    """One head over all pictures. `reader` says which token reads; `top` is the attention of the brightest patch."""

    head: str
    reader: str
    top: float
    pictures: tuple[Picture, ...]


def picture_grid(view: PromptView, heads: Sequence[Head], *, own_label: Collection[Head] = ()) -> list[OverlayRow]:
    """The prompt's pictures under each head's attention.

    Args:
        view: The prompt.
        heads: Which heads, in order.
        own_label: For these heads each picture is read by its own example's label (of its tokens and those that close its turn, the one that looks
            most) where whole patterns are kept; the query's pictures, and everything else, by the last token.
    """
    out = []
    for head in heads:
        last = attention_row(view, head)
        rows, own = [last] * len(view.images), head in own_label and head in view.patterns
        for k, box in enumerate(view.image_boxes if own else ()):
            readers = [attention_row(view, head, p) for p in _own_readers(view, k)]
            if readers and box:
                rows[k] = max(readers, key=lambda row, box=box: float(sum(row[p] for p in box)))
        drawn = pictures(view, rows)
        top = max((p.share for q in drawn for p in q.patches), default=0.0)
        out.append(OverlayRow(name(head), "each picture read by its own label" if own else "read by the last token", top, drawn))
    return out


def _own_readers(view: PromptView, image: int) -> list[int]:
    """Tokens of the label of the picture's example and the template's tokens that close its turn, where chat models gather a label and its picture."""
    shot = _shot(view, image)
    label = [p for p, (s, role) in enumerate(zip(view.shots, view.roles, strict=True)) if role == "label" and s == shot]
    after = label[-1] + 1 if label else 0
    stop = next((p for p in range(after, len(view.roles)) if view.roles[p] != "glue"), len(view.roles))
    return label + list(range(after, stop)) if label else []
