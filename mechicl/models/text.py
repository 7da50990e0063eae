"""Language models without a vision tower, behind the interface of the vision-language models built on them: prompts of words only.

`mechicl.load("Qwen/Qwen2.5-3B-Instruct")` gives a `HookedLM`, so that a language model and the vision-language model that grew out of it are scored on the same episodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mechicl.errors import CheckpointError, ImageError, OptionError, UnsupportedModelError
from mechicl.models.check import limit_of, tolerance
from mechicl.models.probe import text_probe
from mechicl.models.vlm import HookedVLM

if TYPE_CHECKING:
    from mechicl.prompts.batch import Batch
    from mechicl.prompts.episode import Episode
    from mechicl.prompts.render import Renderer

NO_PICTURE = "<|a picture that this model cannot see|>"
"""Stands where a chat template would put a picture; no prompt of words has it."""


class TextProcessor:
    """A tokenizer with the surface of a processor, for prompts of words.

    Args:
        tokenizer: The model's fast tokenizer. Without a padding token it gets its end-of-text token for one (padding is masked).
    """

    image_token = NO_PICTURE

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.chat_template: Any = getattr(tokenizer, "chat_template", None)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)

    def __call__(self, text: Sequence[str], images: Any = None, **options: Any) -> dict[str, Any]:
        """Token ids and mask of prompts.

        Raises:
            ImageError: there are pictures.
        """
        if images:
            raise ImageError("prompts of a language model must be words only; got pictures. Use the vision-language model.")
        options.pop("return_text_replacement_offsets", None)
        out = dict(self.tokenizer(list(text), **options))
        out.pop("token_type_ids", None)
        return out

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The tokenizer's chat template. Most of them take a turn's content as one string, so its parts are joined first."""
        options.setdefault("tokenize", False)
        return self.tokenizer.apply_chat_template([{**turn, "content": _words(turn["content"])} for turn in messages], **options)

    def decode(self, *args: Any, **options: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> Any:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(*args, **options)

    def save_pretrained(self, folder: Any, **options: Any) -> Any:
        """Writes the tokenizer: there is nothing else."""
        return self.tokenizer.save_pretrained(folder, **options)


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(NO_PICTURE if part["type"] == "image" else part["text"] for part in content)


class _Config:
    """A configuration that names an image token which no prompt has, as `Renderer` asks."""

    image_token_id = -1

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


class HookedLM(HookedVLM):
    """A Hugging Face causal language model behind the interface of `HookedVLM`; its prompts are words only.

    Hook points, sizes, rows, rendering and every analysis are those of `HookedVLM`, without `hook_image_features` and `vision`.

    Args:
        hf: The model (AutoModelForCausalLM).
        tokenizer: Its fast tokenizer; None for a model without one: then pass token ids.
        check: The load-time check of `HookedVLM`, and that left padding changes nothing.
        name: What to call it in results.

    Raises:
        UnsupportedModelError: no attention can be hooked, or places are counted from the start of the padding.
        ParityError: the check failed.
    """

    processor: Any
    probe: Mapping[str, Any] | None
    unavailable: Mapping[str, str]

    def __init__(self, hf: Any, tokenizer: Any = None, *, check: bool = True, name: str | None = None, revision: str = "") -> None:
        super().__init__(hf, None, check=check, name=name, revision=revision)  # without a processor the check's prompt is words
        self.processor = None if tokenizer is None else TextProcessor(tokenizer)
        self.probe = text_probe(hf)  # what checks look at it with: a processor of words has no picture to show
        if check:
            _check_padding(self)

    def _grow(self) -> None:
        super()._grow()
        if hasattr(self, "hook_image_features"):
            del self.hook_image_features
        self.unavailable = {**self.unavailable, "hook_image_features": "it is a language model: nothing shows it pictures"}
        self.setup()

    @cached_property
    def renderer(self) -> Renderer:
        """Turns episodes of words into batches with this model's template and tokenizer.

        Raises:
            OptionError: the model was wrapped without a tokenizer.
        """
        from mechicl.prompts.render import Renderer

        if self.processor is None:
            raise OptionError("tokenizer must be given to render episodes; got None. Wrap the model as HookedLM(model, tokenizer).")
        return Renderer(self.processor, _Config(self.hf.config), context=self.cfg.n_ctx)

    def render(self, episodes: Sequence[Episode]) -> Batch:
        """Episodes of words as a left-padded Batch with exact spans.

        Raises:
            ImageError: an episode has pictures.
        """
        for k, episode in enumerate(episodes):
            if episode.images:
                raise ImageError(
                    f"episode {episode.id or k}: episodes of a language model must be words only; got {len(episode.images)} pictures. "
                    "Write them in words (mechicl.analysis.comparison.in_words), or use the vision-language model."
                )
        return super().render(episodes)


@torch.no_grad()
def _check_padding(model: HookedLM) -> None:
    """Raises UnsupportedModelError where tokens before the prompt that nobody may read move its logits: learned places counted from the padding on."""
    plain = model.on_device(text_probe(model.hf))
    ids, mask = plain["input_ids"], plain["attention_mask"]
    padded = {"input_ids": torch.cat([ids[:, :3], ids], 1), "attention_mask": torch.cat([torch.zeros_like(mask[:, :3]), mask], 1)}
    first, second = (model.hf(**one, use_cache=False).logits[:, -1].float() for one in (plain, padded))
    share = float((first - second).abs().max()) / (float(first.std()) or 1.0)
    if not share <= max(10 * tolerance(model.hf.dtype), limit_of(model.hf)):
        raise UnsupportedModelError(
            f"left padding must not change the logits; it moves those of {model.cfg.model_type} by {share:.2g} of their spread (places counted from the padding on?). "
            "Pass check=False and score one prompt at a time (batch_size=1)."
        )


def load_text(source: str, *, dtype: Any, target: torch.device | None, check: bool, name: str, common: Mapping[str, Any], extra: Mapping[str, Any],
              revision: str = "") -> HookedLM:  # fmt: skip
    """Load a causal language model with its tokenizer; `mechicl.load` calls this where transformers has no image-text-to-text class.

    Args:
        source: Folder or hub id.
        dtype: As from_pretrained takes it.
        target: Device; None leaves the model where it is.
        check: See `HookedLM`.
        name: What to call it in results.
        common, extra: Passed to from_pretrained (of all parts; of the model).

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        hf: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **common, **extra)
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model {source!r} must load through transformers; it said: {str(error).splitlines()[0]} Check the files."
        ) from error
    return HookedLM(hf if target is None else hf.to(target), tokenizer, check=check, name=name, revision=revision)


def is_language_model(config: Any) -> bool:
    """Whether transformers has a causal language model, and nothing that sees pictures, for a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return type(config) in AutoModelForCausalLM._model_mapping and type(config) not in AutoModelForImageTextToText._model_mapping
