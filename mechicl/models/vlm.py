"""`HookedVLM`: a Hugging Face vision-language model with TransformerLens' hook names, running its own untouched code."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mechicl.errors import MissingInputError, OptionError, UnsupportedModelError
from mechicl.models.anatomy import Anatomy
from mechicl.models.asked import asked_positions, mask_of, select_logits
from mechicl.models.check import check_parity
from mechicl.models.families import Family, check_inputs, family_of, image_positions
from mechicl.models.guards import check_numbers, dtype_of
from mechicl.models.hooked import Hooked, HookedConfig, HookPoint, RowReducer
from mechicl.models.inspection import inspect
from mechicl.models.norms import Norm, eps_of
from mechicl.models.places import placed
from mechicl.models.prefix import can_continue, continue_prompts
from mechicl.models.probe import probe_inputs
from mechicl.models.rows import collect_rows
from mechicl.models.stored import lead_device
from mechicl.models.tree import grow_block, grow_vision, hooked_config
from mechicl.models.weights import Weights
from mechicl.models.wiring import Wiring
from mechicl.prompts.batch import Batch
from mechicl.prompts.episode import Episode

if TYPE_CHECKING:
    from mechicl.prompts.render import Renderer


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

    family: Family
    hf: Any
    processor: Any
    revision: str
    hook_embed: HookPoint
    unavailable: Mapping[str, str]
    blocks: nn.ModuleList
    vision: nn.Module
    hook_image_features: HookPoint
    ln_final: Norm
    cfg: HookedConfig
    mod_dict: dict[str, nn.Module]
    hook_dict: dict[str, HookPoint]

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
        inputs = self.on_device(probe_inputs(hf, processor, pictures=self.family.needs_picture) if probe is None else probe)
        anatomy, _ = inspect(hf, lambda: hf(**inputs, use_cache=False))
        self.anatomy: Anatomy = anatomy
        self.cfg = hooked_config(hf, anatomy, name, self.device)
        self._grow()
        if check:
            check_numbers(self, inputs)
            check_parity(self)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the first module's device, also where parameters are offloaded or spread over several devices."""
        return lead_device(self.hf)

    def _grow(self) -> None:
        """The tree of hook points, with those that a layer cannot feed left out and explained in `unavailable`."""
        self.hook_embed, unavailable = HookPoint(), dict[str, str]()
        if reason := self.family.no_features or self.anatomy.streams.reason:
            unavailable["hook_image_features"] = reason
        else:
            self.hook_image_features = HookPoint()
        self.blocks = nn.ModuleList(grow_block(layer, part, unavailable) for layer, part in enumerate(self.anatomy.layers))
        if self.anatomy.final_norm is not None:
            self.ln_final = Norm(self.anatomy.final_norm, eps_of(self.anatomy.final_norm))
            self.cfg = replace(self.cfg, normalization_type="LN" if self.ln_final.centered else "RMS")
        self.unavailable = unavailable
        self.vision = grow_vision(len(self.anatomy.vision_layers))
        self.setup()

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
        return self.on_device(placed(self.hf, self.family, given))

    def on_device(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A processor's mapping on this model's device and in its dtype, without labels."""
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
        with select_logits(self.anatomy.unembed, asked_positions(batch, mask_of(inputs), positions)), self.wired(inputs):
            return self.hf(**inputs, use_cache=False).logits

    @contextmanager
    def wired(self, inputs: Mapping[str, Any], handlers: Mapping[int, Any] | None = None) -> Iterator[None]:
        """The hook points listen to the Hugging Face model inside the block; `handlers` take a layer's attention call in their place."""
        self._image_mask = image_positions(self.hf.config, inputs)
        try:
            with nullcontext() if self._deaf else Wiring(self, self.anatomy, lambda: self._image_mask).connected(handlers):
                yield
        finally:
            self._image_mask = None

    def attention_rows(
        self, batch: Batch | Mapping[str, Any], dest: Any = "last", *, layers: Sequence[int] | None = None, reduce: RowReducer | None = None
    ) -> list[Any]:
        """Attention of the asked positions only; the forward itself runs fused attention. See `mechicl.models.rows`."""
        inputs = self.inputs(batch)
        positions = asked_positions(batch, mask_of(inputs), dest)
        return collect_rows(self, inputs, positions, layers=layers, reduce=reduce)

    def continue_prompts(self, batch: Batch, tokens: Sequence[Sequence[Sequence[int]]], copies: int = 1) -> Tensor | None:
        """Logits along several continuations of every prompt, the prompt run once; None where this family cannot. See `mechicl.models.prefix`."""
        if self._continues is None:
            with self.hooks_off():
                self._continues = can_continue(self, batch, tokens)
        return continue_prompts(self, batch, tokens, copies) if self._continues else None

    @contextmanager
    def hooks_off(self) -> Iterator[None]:
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
        with self.wired(inputs):
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
