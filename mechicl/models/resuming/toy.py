"""Resumed runs of toys: their blocks, with attention that reads recorded keys and values for positions that have not changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mechicl.models.hooked import active
from mechicl.models.resuming.attention import KeysValues, attend
from mechicl.models.resuming.run import Pass, Runner
from mechicl.models.toys.model import ToyTransformer
from mechicl.models.toys.parts import Setting, ToyBlock


class ToyRunner(Runner):
    """Runs passes of a toy.

    Args:
        model: The toy.
        at: Its setting in the recorded run.
        past: Keys (after RoPE) and values of every layer, [prompt, head, pos, d_head].
        pre: The recorded stream before every layer.
    """

    at: Setting
    past: Sequence[KeysValues]

    def __init__(
        self,
        model: ToyTransformer,
        at: Setting,
        past: Sequence[KeysValues],
        pre: Sequence[Tensor],
        positions: Tensor,
        logits: Tensor,
    ) -> None:
        super().__init__(model, pre, positions, [None] * (model.cfg.n_layers + 1), logits)
        self.at, self.past = at, past
        n_pos = at.allowed.shape[-1]
        causal = torch.ones(n_pos, n_pos, dtype=torch.bool, device=at.allowed.device).tril()
        plain = at.bias is None and bool((at.allowed == causal).all())
        self.mask: Tensor | None = None if plain else at.allowed
        if at.bias is not None:
            self.mask = at.bias.masked_fill(~at.allowed, -math.inf)

    def _part(self, layer: int) -> ToyBlock:
        return cast(ToyBlock, self.model.blocks[layer])

    def block(self, layer: int, x: Tensor, job: Pass) -> Tensor:
        part = self._part(layer)
        x = part.hook_resid_pre(x)
        q, k, v = self._heads(layer, part, x, job.start, job.copies)
        parts = [(k.transpose(1, 2), v.transpose(1, 2))]
        if job.start:
            parts.insert(0, self._before(layer, 0, job.start))
        return self._finish(part, x, self._attention(part, q, parts, job))

    def last_block(self, x: Tensor, job: Pass) -> Tensor:
        part = self._part(self.n_layers - 1)
        _, k, v = self._heads(self.n_layers - 1, part, x, job.start, job.copies, "KV")
        x = x[:, self.first - job.start :]
        q, _, _ = self._heads(self.n_layers - 1, part, x, self.first, job.copies, "Q")
        parts = [(k.transpose(1, 2), v.transpose(1, 2))]
        if job.start:
            parts.insert(0, self._before(self.n_layers - 1, 0, job.start))
        return self._finish(part, x, self._attention(part, q, parts, job))

    def rest(self, layer: int, x: Tensor, job: Pass) -> Tensor:
        part = self._part(layer)
        if job.at == "z":
            pre = self.pre[layer][:, -x.shape[1] :].repeat_interleave(job.copies, 0)
            return self._finish(part, pre, part.attn.hook_z(x))
        return self._feed(part, x)

    def unembed(self, x: Tensor) -> Tensor:
        return self.model.logits_of(x)

    def _before(self, layer: int, start: int, stop: int) -> KeysValues:
        keys, values = self.past[layer]
        return keys[:, :, start:stop], values[:, :, start:stop]

    def _heads(self, layer: int, part: ToyBlock, x: Tensor, start: int, copies: int, which: str = "QKV") -> list[Any]:
        """Queries, keys and values [row, pos, head, d_head] of positions start, ...; None for those not asked for."""
        attn, normed, out = part.attn, x if part.ln1 is None else part.ln1(x), []
        turning = self._turning(start, copies) if attn.cfg.rotary else None
        for letter in "QKV":
            if letter not in which:
                out.append(None)
                continue
            value = getattr(attn, f"hook_{letter.lower()}")(attn.project(normed, letter))
            if turning is not None and letter != "V":
                value = getattr(attn, f"hook_rot_{letter.lower()}")(attn.turn(value, turning))
            out.append(value)
        return out

    def _turning(self, start: int, copies: int) -> Setting:
        """RoPE's angles of positions start, ... for every row."""
        assert self.at.cos is not None
        assert self.at.sin is not None
        cos, sin = (x[:, start:] if x.shape[0] == 1 else x[:, start:].repeat_interleave(copies, 0) for x in (self.at.cos, self.at.sin))
        return Setting(self.at.allowed[:1], cos, sin)  # only the angles are read

    def _attention(self, part: ToyBlock, q: Tensor, parts: Sequence[KeysValues], job: Pass) -> Tensor:
        """z [row, dest, head, d_head]."""
        attn, n_dest = part.attn, q.shape[1]
        query = q.transpose(1, 2)
        mask = None if self.mask is None else self.mask[:, :, -n_dest:]
        if not (active(attn.hook_attn_scores) or active(attn.hook_pattern)):
            z = attend(query, parts, mask, scale=attn.cfg.score_scale, copies=job.copies, causal=True)
            return attn.hook_z(z)
        keys, values = (
            torch.cat([x if x.shape[0] == len(q) else x.repeat_interleave(job.copies, 0) for x in some], 2)
            for some in zip(*parts, strict=True)
        )
        scores = query @ keys.transpose(2, 3) * attn.cfg.score_scale
        allowed, bias = (None if x is None else x[:, :, -n_dest:] for x in (self.at.allowed, self.at.bias))
        if bias is not None:
            scores = scores + (bias if bias.shape[0] == 1 else bias.repeat_interleave(job.copies, 0))
        assert allowed is not None
        scores = scores.masked_fill(~(allowed if allowed.shape[0] == 1 else allowed.repeat_interleave(job.copies, 0)), -math.inf)
        pattern = attn.hook_pattern(attn.hook_attn_scores(scores).softmax(-1))
        return attn.hook_z((pattern @ values).transpose(1, 2))

    def _finish(self, part: ToyBlock, x: Tensor, z: Tensor) -> Tensor:
        """The stream after a block whose heads gave z."""
        out = z.flatten(2) @ part.attn.W_O.flatten(0, 1) if part.attn.cfg.output_projection else z.flatten(2)
        x = x + part.hook_attn_out(out)
        return self._feed(part, x)

    def _feed(self, part: ToyBlock, x: Tensor) -> Tensor:
        if part.mlp is not None:
            x = part.hook_resid_mid(x)
            x = x + part.hook_mlp_out(part.mlp(x if part.ln2 is None else part.ln2(x)))
        return part.hook_resid_post(x)


def record_toy(model: ToyTransformer, batch: Any, positions: Tensor, keep: Any) -> tuple[ToyRunner, list[Tensor], list[Tensor], Tensor]:
    """One run of a toy.

    Args:
        keep: Hooks of the caller, as `hooks` takes them.

    Returns:
        The runner; the stream before every layer and after the last; after attention in every layer; logits [n, k, vocab].
    """
    pre, mid, keys, values = [], [], [], []
    setting: list[Setting] = []

    def hold(kept: list[Tensor]) -> Any:
        return lambda x, *, hook: kept.append(x)

    hooks = [*keep]
    for layer in range(model.cfg.n_layers):
        at = f"blocks.{layer}."
        hooks += [(at + "hook_resid_pre", hold(pre)), (at + "hook_attn_out", hold(mid))]
        hooks += [(f"{at}attn.hook_{'rot_k' if model.cfg.rotary else 'k'}", hold(keys)), (f"{at}attn.hook_v", hold(values))]
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: setting.append(args[1]))
    try:
        with model.hooks(fwd_hooks=hooks):
            final, _ = model.run_blocks(batch)
            logits = model.logits_of(final.gather(1, positions[..., None].expand(-1, -1, final.shape[-1])))
    finally:
        handle.remove()
    past = [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(keys, values, strict=True)]
    mids = [x + out for x, out in zip(pre, mid, strict=True)]
    runner = ToyRunner(model, setting[0], past, pre, positions, logits)
    return runner, [*pre, final], mids, logits
