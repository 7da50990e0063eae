"""`HookedVLM`: a Hugging Face vision-language model with TransformerLens' hook names, running its own untouched code."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mechicl.errors import MissingInputError, OptionError, UnsupportedModelError
from mechicl.models.anatomy import Anatomy, inspect
from mechicl.models.check import check_parity
from mechicl.models.families import check_inputs, family_of, image_positions
from mechicl.models.guards import check_numbers, dtype_of
from mechicl.models.hooked import Hooked, HookedConfig, HookPoint, RowReducer
from mechicl.models.norms import Norm, eps_of
from mechicl.models.places import placed
from mechicl.models.prefix import can_continue, continue_prompts
from mechicl.models.probe import probe_inputs
from mechicl.models.rows import collect_rows
from mechicl.models.stored import lead_device
from mechicl.models.weights import AttentionWeights, Weights
from mechicl.models.wiring import ATTENTION_ONLY, Wiring
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode

if TYPE_CHECKING:
    from mechicl.prompts.render import Renderer


class Block(nn.Module):
    """Hook points of one decoder layer; `attn` holds those of its heads."""


class HookedVLM(Weights, Hooked):
    """A Hugging Face image-text-to-text model behind TransformerLens' interface.

    The model runs its own code: with nothing attached its logits are bit-equal to the plain model's, and hook points cost nothing. `hf` is
    the wrapped model, `processor` its processor (None for a model without one: then pass the processor's mapping yourself), `cfg` the sizes.

    Hook points, for layer l (shapes; edits take effect unless said otherwise):
        hook_image_features [image token, d_model]: what the projector put into the sequence, all pictures of the batch in prompt order
        hook_embed [batch, pos, d_model]: the embeddings after the pictures are merged in
        blocks.l.hook_resid_pre, hook_attn_out, hook_resid_mid, hook_mlp_out, hook_resid_post [batch, pos, d_model]
        blocks.l.attn.hook_q, hook_k, hook_v [batch, pos, head or kv_head, d_head]: before RoPE, after any norm of q and k
        blocks.l.attn.hook_rot_q, hook_rot_k: the same after RoPE
        blocks.l.attn.hook_attn_scores, hook_pattern [batch, head, dest, src]
        blocks.l.attn.hook_z [batch, pos, head, d_head]: what the output projection reads
        blocks.l.ln1, ln2, ln_final: hook_scale [batch, pos, 1], hook_normalized [batch, pos, d_model] (to read only)
        vision.blocks.i.hook_resid_pre, hook_resid_post: the tower's own layout

    Args:
        hf: The model.
        processor: Its processor.
        check: Run the load-time check: hooked against plain logits, mass on masked positions, one call per layer; in half precision also overflow and
            whether attention implementations agree (a PrecisionWarning where they do not).
        name: What to call it in results; default its name_or_path.
        probe: A processor's mapping to look at the model with, for one without a processor whose forward asks for a picture; default a short text.

    Raises:
        UnsupportedModelError: the family is refused, or no attention can be hooked; says why.
        ParityError: the check failed.
    """

    def __init__(
        self,
        hf: Any,
        processor: Any = None,
        *,
        check: bool = True,
        name: str | None = None,
        revision: str = "",
        probe: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not hasattr(hf, "config") or not hasattr(hf, "get_decoder"):
            raise UnsupportedModelError(
                f"hf must be a Hugging Face image-text-to-text model; got {type(hf).__name__}. Load it with mechicl.load(name) or AutoModelForImageTextToText."
            )
        self.family = family_of(hf.config)
        self.hf, self.processor, self.revision = hf.eval(), processor, revision
        self._image_mask: Tensor | None = None
        self._continues: bool | None = None
        self._deaf = False
        self.probe = probe
        inputs = self._to_device(probe_inputs(hf, processor, pictures=self.family.needs_picture) if probe is None else probe)
        anatomy, _ = inspect(hf, lambda: hf(**inputs, use_cache=False))
        self.anatomy: Anatomy = anatomy
        self.cfg = self._config(name)
        self._grow()
        if check:
            check_numbers(self, inputs)
            check_parity(self)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the first module's device, also where parameters are offloaded or spread over several devices."""
        return lead_device(self.hf)

    def _config(self, name: str | None) -> HookedConfig:
        hf, layers = self.hf, self.anatomy.layers
        first = next(part for part in layers if part.attention is not None)
        text = hf.config.get_text_config()
        mlp = getattr(text, "intermediate_size", None)
        return HookedConfig(
            model_name=name or getattr(hf, "name_or_path", "") or type(hf).__name__, model_type=hf.config.model_type, n_layers=len(layers),
            n_heads=max(part.n_heads for part in layers), n_key_value_heads=max(part.n_key_value_heads for part in layers),
            d_model=self.anatomy.d_model, d_head=first.d_head, d_vocab=self.anatomy.unembed.weight.shape[0],  # type: ignore[union-attr]
            n_ctx=int(getattr(text, "max_position_embeddings", 0) or 1 << 20), d_mlp=mlp if isinstance(mlp, int) else None,
            normalization_type="RMS", device=str(self.device), dtype=dtype_of(hf),
        )  # fmt: skip

    def _grow(self) -> None:
        """The tree of hook points, with those that a layer cannot feed left out and explained in `unavailable`."""
        self.hook_embed, self.blocks, unavailable = HookPoint(), nn.ModuleList(), {}
        if reason := self.family.no_features or self.anatomy.streams.reason:
            unavailable["hook_image_features"] = reason
        else:
            self.hook_image_features = HookPoint()
        for layer, part in enumerate(self.anatomy.layers):
            block, attn = Block(), AttentionWeights()
            attn.__dict__["part"] = part
            for name in ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"):
                self._add(block, name, part.reasons, f"blocks.{layer}.{name}", unavailable)
            for name in ("q", "k", "v", "z", *ATTENTION_ONLY):
                self._add(
                    attn,
                    f"hook_{name}",
                    {k.removeprefix("attn."): v for k, v in part.reasons.items()},
                    f"blocks.{layer}.attn.hook_{name}",
                    unavailable,
                )
            block.attn = attn
            for name, norm in (("ln1", part.ln1), ("ln2", part.ln2)):
                if norm is not None:
                    setattr(block, name, Norm(norm, eps_of(norm)))
            self.blocks.append(block)
        if self.anatomy.final_norm is not None:
            self.ln_final = Norm(self.anatomy.final_norm, eps_of(self.anatomy.final_norm))
            self.cfg = replace(self.cfg, normalization_type="LN" if self.ln_final.centered else "RMS")
        self.vision = nn.Module()
        self.vision.blocks = nn.ModuleList()
        for _ in self.anatomy.vision_layers:
            block = Block()
            block.hook_resid_pre, block.hook_resid_post = HookPoint(), HookPoint()
            self.vision.blocks.append(block)
        self.unavailable = unavailable
        self.setup()

    @staticmethod
    def _add(owner: nn.Module, name: str, reasons: Mapping[str, str], full: str, unavailable: dict[str, str]) -> None:
        if name in reasons:
            unavailable[full] = reasons[name]
        else:
            setattr(owner, name, HookPoint())

    def setup(self) -> None:
        """TransformerLens' registry of hook points; the Hugging Face model's own modules are left as they are."""
        self.mod_dict, self.hook_dict = {}, {}
        for name, module in self.named_modules():
            if name and not name.startswith("hf"):
                module.name = name  # type: ignore[assignment]
                self.mod_dict[name] = module
                if isinstance(module, HookPoint):
                    self.hook_dict[name] = module

    @property
    def not_additive(self) -> str:
        """Why heads' outputs are not what is added to the stream; "" where they are."""
        return self.anatomy.not_additive

    @cached_property
    def renderer(self) -> Renderer:
        """Turns episodes into batches with this model's template and processor.

        Raises:
            OptionError: the model was wrapped without a processor.
        """
        from mechicl.prompts.render import Renderer

        if self.processor is None:
            raise OptionError("processor must be given to render episodes; got None. Wrap the model as HookedVLM(model, processor).")
        return Renderer(self.processor, self.hf.config, context=self.cfg.n_ctx)

    def render(self, episodes: Sequence[Episode]) -> Batch:
        """Episodes as a left-padded Batch with exact spans."""
        return self.renderer.render(episodes)

    def inputs(self, batch: Any) -> dict[str, Any]:
        """What goes into the Hugging Face model: on its device, in its dtype, checked to be whole."""
        if isinstance(batch, Tensor):
            batch = {
                "input_ids": batch if batch.dim() == 2 else batch[None],
                "attention_mask": torch.ones_like(batch if batch.dim() == 2 else batch[None]),
            }
        given = batch.inputs if isinstance(batch, Batch) else batch
        if not isinstance(given, Mapping) and not hasattr(given, "keys"):
            raise MissingInputError(
                f"batch must be a Batch, a processor's mapping or token ids; got {type(given).__name__}. Render episodes first."
            )
        check_inputs(self.hf.config, given)
        return self._to_device(placed(self.hf, self.family, given))

    def _to_device(self, given: Mapping[str, Any]) -> dict[str, Any]:
        device, dtype = self.device, dtype_of(self.hf)
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items() if k != "labels"}  # labels would ask for a loss
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in moved.items()}

    def forward(self, batch: Batch | Mapping[str, Any] | Tensor, *, positions: Any = "last") -> Tensor:
        """Logits at the asked positions only.

        Args:
            batch: A Batch, the processor's mapping, or token ids [batch, pos].
            positions: "last" (the last prompt token of every row), "all", or a LongTensor [n] or [batch, n].

        Returns:
            Logits [batch, n, vocab]; n = 1 for "last".

        Raises:
            MissingInputError: an input without which the family is silently wrong.
        """
        inputs = self.inputs(batch)
        with self._select_logits(self._positions(batch, inputs, positions)), self._wired(inputs):
            return self.hf(**inputs, use_cache=False).logits

    @contextmanager
    def _wired(self, inputs: Mapping[str, Any], handlers: Mapping[int, Any] | None = None):
        self._image_mask = image_positions(self.hf.config, inputs)
        try:
            with nullcontext() if self._deaf else Wiring(self, self.anatomy, lambda: self._image_mask).connected(handlers):
                yield
        finally:
            self._image_mask = None

    def _positions(self, batch: Any, inputs: Mapping[str, Any], positions: Any) -> Tensor | None:
        """[n] or [batch, n] on the device, None for all."""
        n_pos = inputs["input_ids"].shape[1]
        if isinstance(positions, str):
            if positions == "all":
                return None
            if positions != "last":
                raise OptionError(
                    f'positions must be "last", "all" or a tensor of positions; got {positions!r}. Ask for the ones you read.'
                )
            if isinstance(batch, Batch):
                return batch.query_pos.to(self.device)[:, None]
            mask = inputs.get("attention_mask")
            if mask is None:
                return torch.tensor([n_pos - 1], device=self.device)
            return (n_pos - 1 - mask.flip(1).argmax(1))[:, None]
        found = torch.as_tensor(positions, device=self.device)
        if found.numel() == 0 or int(found.max()) >= n_pos or int(found.min()) < -n_pos:
            raise OptionError(f"positions must be in 0..{n_pos - 1} (or negative, from the end); got {positions}. Count padding too.")
        return found % n_pos

    @contextmanager
    def _select_logits(self, positions: Tensor | None):
        """Let the unembedding see the asked positions only, so that [every position x vocabulary] never exists."""
        if positions is None:
            yield
            return

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = args[0]
            if positions.dim() == 1:
                return (hidden.index_select(1, positions.to(hidden.device)), *args[1:])
            return (hidden.gather(1, positions.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])), *args[1:])

        handle = self.anatomy.unembed.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def attention_rows(
        self, batch: Batch | Mapping[str, Any], dest: Any = "last", *, layers: Sequence[int] | None = None, reduce: RowReducer | None = None
    ) -> list[Any]:
        """Attention of the asked positions only; the forward itself runs fused attention. See `mechicl.models.rows`."""
        inputs = self.inputs(batch)
        positions = self._positions(batch, inputs, dest)
        return collect_rows(self, inputs, positions, layers=layers, reduce=reduce)

    def continue_prompts(self, batch: Batch, tokens: Sequence[Sequence[Sequence[int]]], copies: int = 1) -> Tensor | None:
        """Logits along several continuations of every prompt, the prompt run once; None where this family cannot. See `mechicl.models.prefix`."""
        if self._continues is None:
            with self.hooks_off():
                self._continues = can_continue(self, batch, tokens)
        return continue_prompts(self, batch, tokens, copies) if self._continues else None

    @contextmanager
    def hooks_off(self):
        """No hook point listens inside the block; those that did listen again afterwards."""
        wired, self._deaf = self._deaf, True
        try:
            yield
        finally:
            self._deaf = wired

    @torch.no_grad()
    def generate(self, batch: Batch | Mapping[str, Any], *, max_new_tokens: int = 16, **kwargs: Any) -> Tensor:
        """Greedy continuation [batch, new tokens], hooks included: each fires once per step."""
        known = {*signature(self.hf.forward).parameters, *signature(self.hf.prepare_inputs_for_generation).parameters}
        inputs = {k: v for k, v in self.inputs(batch).items() if k in known}  # generate refuses what forward takes as **kwargs
        with self._wired(inputs):
            out = self.hf.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **kwargs)
        return out[:, inputs["input_ids"].shape[1] :]

    def trace(self, batch: Batch | Mapping[str, Any], *, remote: bool | str = False, **kwargs: Any) -> Any:
        """nnsight on the same Hugging Face model: `with model.trace(batch): x = model.nnsight.lm_head.output.save()`.

        With `remote` (True, or a host's address) the block runs on nnsight's server, for a model loaded by its hub id and a user with a key: read it through
        `model.remote`. See `mechicl.models.trace`.

        Raises:
            OptionError: remote without a key, or of a model that is not on the hub.
        """
        from mechicl.models.trace import open_trace

        return open_trace(self.nnsight, lambda: self.remote, self.inputs(batch), where=remote, **kwargs)

    @cached_property
    def nnsight(self) -> Any:
        """The nnsight envoy of the Hugging Face model."""
        from mechicl.models.trace import envoy

        return envoy(self.hf)

    @cached_property
    def remote(self) -> Any:
        """The nnsight envoy of the same model on the hub, for remote traces; no weights are loaded."""
        from mechicl.models.trace import remote_envoy

        return remote_envoy(self.cfg.model_name, pictures=bool(self.hf.config.to_dict().get("vision_config")))

    def describe(self) -> dict[str, Any]:
        """What `results.Provenance` needs to name this model."""
        versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "transformer-lens")}
        return {
            "model": self.cfg.model_name, "revision": self.revision, "dtype": str(self.cfg.dtype).removeprefix("torch."),
            "attention": self.anatomy.configs[0]._attn_implementation, "device": str(self.device), "versions": versions,
        }  # fmt: skip

    def __repr__(self) -> str:
        c = self.cfg
        return (
            f"HookedVLM({c.model_name!r}, {c.model_type}, {c.n_layers} layers x {c.n_heads} heads ({c.n_key_value_heads} key/value), "
            f"d_model {c.d_model}, {self.cfg.dtype}, {self.device})"
        )
