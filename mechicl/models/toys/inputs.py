"""What enters a toy: its inputs, their mask, items of both modalities and places as the first stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechicl.errors import MissingInputError, OptionError
from mechicl.models.hooked import HookPoint
from mechicl.models.toys.config import ToyConfig
from mechicl.models.toys.parts import Setting
from mechicl.models.toys.positions import one_hot
from mechicl.prompts.batch import Batch

Given = Batch | Mapping[str, Any] | Tensor
"""A batch; its inputs; or the tokens alone: ids [batch, pos], or vectors [batch, pos, d_input]."""


def inputs_of(batch: Given) -> Mapping[str, Any]:
    """The inputs of whatever was passed to a toy."""
    if isinstance(batch, Tensor):
        return {"inputs_embeds" if batch.is_floating_point() else "input_ids": batch}
    return batch.inputs if isinstance(batch, Batch) else batch


class ToyInputs:
    """From inputs to the stream before the first block; mixed into `ToyTransformer`, which has the parts."""

    cfg: ToyConfig
    blocks: nn.ModuleList
    rope: Tensor
    slopes: Tensor
    encoder: nn.Module | None
    projector: nn.Module | None
    W_E: nn.Parameter
    W_pos: nn.Parameter
    hook_image_features: HookPoint

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.blocks[0].attn.W_Q.device  # type: ignore[union-attr, return-value]

    def mask(self, batch: Given) -> Int[Tensor, "batch pos"]:
        """The attention mask of a batch, on the model's device; ones where the batch has none.

        Raises:
            MissingInputError: what the model reads is not there, or has another number of axes.
            OptionError: a mask of another shape than the tokens.
        """
        inputs = inputs_of(batch)
        name, dim = ("input_ids", 2) if self.cfg.inputs == "tokens" else ("inputs_embeds", 3)
        given = inputs.get(name)
        if given is None or given.dim() != dim:
            shape = "[batch, pos]" if dim == 2 else "[batch, pos, d_input]"
            raise MissingInputError(
                f"{name} must be given, {shape}; got {None if given is None else tuple(given.shape)}. The model reads {self.cfg.inputs}."
            )
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape != given.shape[:2]:
            raise OptionError(
                f"attention_mask must be {list(given.shape[:2])} as {name} is; got {list(mask.shape)}. Vectors cannot be continued with token ids."
            )
        return torch.ones(given.shape[:2], dtype=torch.long, device=self.device) if mask is None else mask.to(self.device)

    def _content(self, inputs: Mapping[str, Any]) -> Float[Tensor, "batch pos d_model"]:
        """The stream before places are added."""
        if self.cfg.inputs == "tokens":
            return self.W_E[inputs["input_ids"].to(self.device)]
        content: Tensor = inputs["inputs_embeds"].to(self.device)
        values = inputs.get("second_values")
        if values is not None:
            if inputs.get("second_pos") is None:
                raise MissingInputError(
                    "second_pos must come with second_values; it is missing. Give the position of every second-modality item."
                )
            where: Tensor = inputs["second_pos"].to(self.device)
            features = self.hook_image_features(self._features(values.to(self.device))).to(content.dtype)
            content = content.scatter(1, where[..., None].expand(-1, -1, content.shape[-1]), features)
        return self._stream(content)

    def _features(self, values: Tensor) -> Float[Tensor, "batch n_second d_input"]:
        """Second-modality values [batch, n_second, *shape] as token vectors."""
        n = values.shape[:2]
        features = values.flatten(0, 1)
        if self.encoder is not None:
            features = self.encoder(features)
        if self.projector is not None:
            features = self.projector(features)
        if features.shape[1:] != (self.cfg.d_input,):
            raise OptionError(
                f"second-modality features must be d_input = {self.cfg.d_input} wide; got {tuple(features.shape[1:])}. Give the model a projector."
            )
        return features.unflatten(0, n)

    def _stream(self, content: Tensor) -> Float[Tensor, "batch pos d_model"]:
        """Vectors in their coordinates of the stream: n_places zeros, the vector, zeros."""
        if self.cfg.inputs == "tokens":
            return content
        if content.shape[-1] != self.cfg.d_input:
            raise OptionError(f"tokens must be d_input = {self.cfg.d_input} wide; got {content.shape[-1]}. Build the model for this task.")
        before, after = self.cfg.n_places, self.cfg.d_model - self.cfg.n_places - self.cfg.d_input
        return nn.functional.pad(content, (before, after)) if before or after else content

    def _place_code(self, place: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What places add to the stream."""
        if self.cfg.positions == "learned":
            return self.W_pos[place]
        if self.cfg.one_hot:
            return nn.functional.pad(one_hot(place, self.cfg.n_places, dtype), (0, self.cfg.d_model - self.cfg.n_places))
        return None

    def _setting(self, place: Tensor, allowed: Tensor) -> Setting:
        if self.cfg.rotary:
            cos, sin = self.rope[:, place].unsqueeze(-2)
            return Setting(allowed, cos, sin)
        if self.cfg.positions == "alibi":
            distance = place[:, None, :, None] - place[:, None, None, :]
            return Setting(allowed, bias=-self.slopes[:, None, None] * distance)
        return Setting(allowed)
