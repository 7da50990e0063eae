"""Low-rank adapters on a decoder: putting them in, writing them as peft's own folder, reading and merging them (peft's one home in mechicl).

A folder holds adapter_config.json and adapter_model.safetensors, which peft and transformers read too; the base model is named in the first. Weights are
safetensors only: an adapter saved as a pickle is refused.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mechicl.errors import CheckpointError, UnsupportedModelError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    folder = Path(path)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: str | Path) -> str:
    """The model that an adapter belongs to: "demo", a folder or a hub id.

    Raises:
        CheckpointError: the folder does not say, or its weights are missing or pickled.
    """
    path = Path(folder)
    try:
        base = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{CONFIG} in {path} must be readable JSON; got: {error}. Save the adapter again.") from error
    if not base:
        raise CheckpointError(
            f"{CONFIG} must name its base model (base_model_name_or_path); {path} does not. Write the base model's folder or id into it."
        )
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"adapter folder must contain {WEIGHTS}; {path} does not. Save with safe_serialization=True.")
    return str(base)


@contextmanager
def quietly() -> Iterator[None]:
    """peft 0.21 still asks transformers by a name that transformers 5.23 calls deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        yield


def add_adapters(
    hf: nn.Module, targets: Sequence[str], whole: Sequence[str], *, rank: int, alpha: float, dropout: float, base: str, seed: int
) -> Any:
    """Put low-rank adapters into a model, in place; everything else in it is frozen.

    Args:
        targets: Full names of the linear layers that get an adapter.
        whole: Full names of modules that are trained whole (the projector).
        rank, alpha, dropout: Of every adapter: the layer's output gets alpha / rank * B A x.
        base: What the adapter folder will call its base model.
        seed: Of A; B starts at zero, so the model's logits do not change.

    Returns:
        peft's PeftModel; its `get_base_model()` is `hf`.

    Source:
        Hu et al. 2021 (arXiv 2106.09685).
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), modules_to_save=list(whole) or None)  # type: ignore[arg-type]
    with quietly(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(hf, config)  # type: ignore[arg-type]
    config.base_model_name_or_path = base  # behind peft's back: it wants the name under which transformers loaded the model
    return model


def adapter_tensors(adapted: Any) -> dict[str, Tensor]:
    """The adapter's weights under peft's names."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(adapted, save_embedding_layers=False)  # "auto" would ask the hub for the base model


def adapter_json(adapted: Any) -> str:
    """What peft writes as adapter_config.json, in one order."""
    config = dict(adapted.peft_config["default"].to_dict())
    config["inference_mode"] = True
    return json.dumps(config, indent=2, sort_keys=True, default=lambda x: sorted(x) if isinstance(x, set) else str(x)) + "\n"


def merged(adapted: Any) -> Any:
    """The plain Hugging Face model with the adapters added into its weights. The adapted model is spent."""
    return adapted.merge_and_unload()


def merged_copy(adapted: Any) -> Any:
    """`merged`, the adapted model left as it is; takes its memory once more."""
    return merged(copy.deepcopy(adapted))


def read_adapters(hf: nn.Module, folder: str | Path) -> Any:
    """A base model with a folder's adapters merged into its weights, in place.

    Raises:
        CheckpointError: pickled or damaged weights, or another model's adapters.
        UnsupportedModelError: the adapter is of a kind that cannot be merged.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    base_of(folder)
    try:
        with quietly(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(hf, str(folder))  # type: ignore[arg-type]
    except (SafetensorError, RuntimeError, ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"adapter folder must fit its base model; {folder} does not: {str(error).splitlines()[0]}") from error
    missing = [str(one.message).splitlines()[0] for one in said if "missing" in str(one.message)]
    if missing:
        raise CheckpointError(f"adapter folder must be whole; {folder} is not: {missing[0][:200]} Save it again.")
    if not hasattr(model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"adapter must be one that can be merged into the weights; {folder} holds a {model.peft_type}. Use LoRA."
        )
    return merged(model)


def trainable(model: nn.Module) -> Mapping[str, nn.Parameter]:
    """The parameters that a training moves, by name, tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
