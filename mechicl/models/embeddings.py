"""Items as vectors, so that like can be found among them: by the model's own eyes and words, or by a CLIP-type model in a local folder.

The label of an item is never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mechicl.errors import CheckpointError, EpisodeError, NotFiniteError, OptionError
from mechicl.models.load import check_device, check_folder
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.spans import QUERY

Eyes = Literal["features", "tower"]
"""Where a picture's vector is read: the features that the projector puts into the prompt, or the vision tower's last layer before it."""


@dataclass(frozen=True, eq=False)
class Embeddings:
    """One row per item for what it shows and for what it says; a row of zeros where an item has no picture or no text. `source`: who made them."""

    image: Float[np.ndarray, "n d_image"]
    text: Float[np.ndarray, "n d_text"]
    source: str = ""

    def __len__(self) -> int:
        return len(self.image)

    def take(self, rows: Sequence[int]) -> Embeddings:
        """The items `rows`."""
        index = np.asarray(rows, dtype=int)
        return Embeddings(self.image[index], self.text[index], self.source)


@runtime_checkable
class Embedder(Protocol):
    """Anything that turns items into vectors."""

    def __call__(self, shots: Sequence[Shot], /) -> Embeddings: ...


@dataclass(frozen=True, eq=False)
class OwnEmbedder:
    """The model's own embeddings: the mean of what the decoder is given for the picture's tokens, and for the text's tokens.

    Nothing of the decoder itself is run: the pass stops where the prompt enters the first layer.

    Attributes:
        model: A `HookedVLM`, or a toy.
        eyes: See `Eyes`. A family whose pictures are no tokens of the prompt (Mllama) is read at its tower.
        candidates: Two labels that the renderer takes; they do not enter the prompt.
    """

    model: Any
    eyes: Eyes = "features"
    candidates: tuple[str, ...] = ("yes", "no")

    def __post_init__(self) -> None:
        if self.eyes not in get_args(Eyes):
            raise OptionError(f"eyes must be one of {', '.join(get_args(Eyes))}; got {self.eyes!r}. features is what the decoder reads.")

    def __call__(self, shots: Sequence[Shot], /) -> Embeddings:
        """One row per item.

        Raises:
            EpisodeError: no items, or the items have neither picture nor text tokens.
            NotFiniteError: the model gives NaN.
        """
        if not shots:
            raise EpisodeError("shots must be a non-empty list; got none. Give the items to embed.")
        rows = [self._one(replace(shot, label=self.candidates[0])) for shot in shots]
        source = f"{self.model.describe().get('model', '')}, own {self.eyes}"
        return _stack([image for image, _ in rows], [text for _, text in rows], source)

    @torch.no_grad()
    def _one(self, shot: Shot) -> tuple[np.ndarray | None, np.ndarray | None]:
        batch = self.model.render([Episode((), shot, self.candidates)])
        stream = _read(self.model, batch, "hook_embed")[0]
        image, text = (_mean(stream, batch.mask(role, shot=QUERY)[0]) for role in ("image", "text"))
        tower = _tower(self.model)
        if tower and shot.images and (self.eyes == "tower" or "hook_image_features" not in self.model.hook_dict):
            image = _read(self.model, batch, tower).flatten(0, -2).mean(0).cpu().numpy()
        return image, text


@dataclass(frozen=True, eq=False)
class ClipEmbedder:
    """Embeddings of a CLIP-type model (CLIP, SigLIP, ...): `get_image_features` and `get_text_features`. Of several pictures, the mean."""

    clip: Any
    processor: Any
    name: str = "CLIP"

    @torch.no_grad()
    def __call__(self, shots: Sequence[Shot], /) -> Embeddings:
        """One row per item.

        Raises:
            EpisodeError: no items.
            NotFiniteError: the model gives NaN.
        """
        if not shots:
            raise EpisodeError("shots must be a non-empty list; got none. Give the items to embed.")
        images = [np.mean([self._image(one) for one in shot.images], 0) if shot.images else None for shot in shots]
        return _stack(images, [self._text(shot.text) if shot.text else None for shot in shots], self.name)

    def _image(self, image: Image.Image) -> np.ndarray:
        given = self.processor(images=image.convert("RGB"), return_tensors="pt")
        return self._pooled(self.clip.get_image_features, pixel_values=given["pixel_values"])

    def _text(self, text: str) -> np.ndarray:
        given = self.processor(text=[text], return_tensors="pt", truncation=True)
        return self._pooled(self.clip.get_text_features, **{k: given[k] for k in ("input_ids", "attention_mask") if k in given})

    def _pooled(self, read: Callable[..., Any], **inputs: Tensor) -> np.ndarray:
        found = read(**{k: v.to(self.clip.device) for k, v in inputs.items()})
        pooled = found if isinstance(found, Tensor) else found.pooler_output  # a tensor or an output, as transformers' version has it
        return pooled[0].float().cpu().numpy()


def load_clip(folder: str | Path, *, device: str = "cpu") -> ClipEmbedder:
    """A CLIP-type model from a local folder: safetensors only, no code of the checkpoint's own, nothing downloaded.

    Raises:
        CheckpointError: the folder is no checkpoint, or its model does not embed pictures and texts.
        DeviceError: a device that this machine does not have.
    """
    from transformers import AutoModel, AutoProcessor

    path, target = Path(folder).expanduser(), check_device(device)
    check_folder(path)
    try:
        clip: Any = AutoModel.from_pretrained(str(path), use_safetensors=True, local_files_only=True)
        processor = AutoProcessor.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"folder {path} must load through transformers; it said: {str(error).splitlines()[0]} Check it.") from error
    missing = [name for name in ("get_image_features", "get_text_features") if not hasattr(clip, name)]
    if missing:
        raise CheckpointError(
            f"folder must hold a CLIP-type model; {path} holds {type(clip).__name__}, which has no {missing[0]}. Use OwnEmbedder for it."
        )
    return ClipEmbedder(clip.eval().to(target), processor, name=path.name)


class _Enough(Exception):
    """What was wanted has been read; the rest of the pass is not needed."""


def _read(model: Any, batch: Batch, name: str) -> Tensor:
    """What passes the hook point first, float32; the forward pass stops there."""
    kept: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        kept.append(x.detach().float())
        raise _Enough

    try:
        with model.hooks(fwd_hooks=[(name, keep)]):
            model(batch)
    except _Enough:
        pass
    return kept[0]


def _tower(model: Any) -> str | None:
    """The hook point behind the vision tower's last layer, where there is a tower."""
    layers = [int(name.split(".")[2]) for name in model.hook_dict if name.startswith("vision.blocks.")]
    return f"vision.blocks.{max(layers)}.hook_resid_post" if layers else None


def _mean(stream: Float[Tensor, "pos d"], mask: Tensor) -> np.ndarray | None:
    return stream[mask.to(stream.device)].mean(0).cpu().numpy() if bool(mask.any()) else None


def _stack(images: Sequence[np.ndarray | None], texts: Sequence[np.ndarray | None], source: str) -> Embeddings:
    """Rows of zeros where something is missing."""
    parts = []
    for rows in (images, texts):
        width = next((len(row) for row in rows if row is not None), 0)
        parts.append(np.stack([np.zeros(width) if row is None else np.asarray(row, dtype=np.float64) for row in rows]))
    empty = next((k for k, (a, b) in enumerate(zip(images, texts, strict=True)) if a is None and b is None), None)
    if empty is not None:
        raise EpisodeError(f"every item must have a picture or a text that becomes tokens; item {empty} has none. Leave it out.")
    if not all(np.isfinite(part).all() for part in parts):
        raise NotFiniteError("embeddings must be finite; got NaN or infinity. Use float32 or bfloat16, and check the weights.")
    return Embeddings(parts[0], parts[1], source)
