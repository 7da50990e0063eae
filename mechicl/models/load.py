"""`mechicl.load`: from a name to a hooked model, with every refusal before the download or the weights."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mechicl.errors import CheckpointError, DeviceError, OptionError, UnsupportedModelError
from mechicl.models.adapters import base_of, is_adapter, read_adapters
from mechicl.models.families import TESTED, family_of
from mechicl.models.text import HookedLM, is_language_model, load_text
from mechicl.models.vlm import HookedVLM

Quantize = Literal["8bit", "4bit"]
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def demo_folder() -> Path:
    """The bundled model's folder.

    Raises:
        CheckpointError: the installation lacks it.
    """
    folder = Path(str(importlib.resources.files("mechicl") / "assets" / "demo_vlm"))
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"the bundled model must be at {folder}; it is not. Reinstall mechicl, or train it: mechicl train vlm --out {folder}."
        )
    return folder


def check_device(device: str) -> torch.device:
    """The device, if this machine has it.

    Raises:
        DeviceError: it does not.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(
            f'device must be "cpu", "cuda", "cuda:1", "mps" or another that torch knows; got {device!r}. Use "cpu" or "cuda".'
        ) from error
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise DeviceError(
            f'device must exist on this machine; got {device!r} with {torch.cuda.device_count()} CUDA devices. Use device="cpu".'
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f'device must exist on this machine; got {device!r}. Use device="cpu".')
    return found


def check_dtype(dtype: str | torch.dtype) -> Any:
    """The dtype that from_pretrained takes.

    Raises:
        OptionError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}. float32 is the safest for scores.")
    return DTYPES[dtype]


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a safetensors checkpoint.

    Raises:
        CheckpointError: what is missing, or that its weights are pickles.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model folder must contain config.json; {folder} does not. Save it with model.save_pretrained and processor.save_pretrained."
        )
    try:
        json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"config.json in {folder} must be readable JSON; got: {error}. Save the model again.") from error
    if not list(folder.glob("*.safetensors")):
        pickles = [f.name for f in folder.glob("*.bin")] + [f.name for f in folder.glob("*.pt")]
        found = f"only pickled weights ({', '.join(pickles)}), which mechicl never loads" if pickles else "no weights"
        raise CheckpointError(f"model folder must contain *.safetensors; {folder} has {found}. Save with safe_serialization=True.")


def check_placing(device_map: Any, max_memory: Any, offload_folder: Any, quantize: str | None, device: str | None) -> dict[str, Any]:
    """What from_pretrained takes to lay a big model out over devices, or to pack it.

    Raises:
        OptionError: options that need another one, or a package that is not installed.
    """
    if device_map is None and (max_memory is not None or offload_folder is not None):
        raise OptionError('max_memory and offload_folder must come with device_map; got none. Add device_map="auto".')
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise OptionError("device_map must be left out where accelerate is not installed. Run pip install 'mechicl[big]'.")
    found: dict[str, Any] = {}
    if max_memory is not None:
        found["max_memory"] = max_memory
    if offload_folder is not None:
        found["offload_folder"] = str(offload_folder)
    if quantize is None:
        return found
    if quantize not in get_args(Quantize):
        raise OptionError(
            f"quantize must be one of {', '.join(get_args(Quantize))}; got {quantize!r}. Leave it out for the weights as saved."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise OptionError(
            f"quantize must be left out where bitsandbytes is not installed; got {quantize!r}. Run pip install 'mechicl[big]'."
        )
    from transformers import BitsAndBytesConfig

    spared = ["visual", "vision_tower", "vision_model", "multi_modal_projector", "lm_head"]
    how: dict[str, Any] = {"load_in_8bit": True} if quantize == "8bit" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    found["quantization_config"] = BitsAndBytesConfig(**how, llm_int8_skip_modules=spared)
    if device_map is None:
        found["device_map"] = {"": device or "cpu"}
    return found


def check_model(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Refuse a name that `load` would refuse, without its weights: for work on several models, before the first one is loaded.

    Raises:
        CheckpointError, UnsupportedModelError: see `load`.
    """
    path = demo_folder() if str(name) == "demo" else Path(name).expanduser()
    if is_adapter(path):
        check_model(base_of(path), revision=revision, trust_remote_code=trust_remote_code)
        return
    source = _source(name, path)
    config = _config(source, {"trust_remote_code": trust_remote_code, **({"revision": revision} if revision else {})})
    _check_kind(source, config, trust_remote_code)


def _source(name: str | Path, path: Path) -> str:
    """What transformers takes: a checked folder, or a hub id."""
    if path.is_dir():
        check_folder(path)
        return str(path)
    if path.is_file():
        raise CheckpointError(f'model must be "demo", a folder or a hub id; {path} is a file. Name the folder that holds it.')
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise CheckpointError(f'model must be "demo", a folder or a hub id; there is no folder {path}. Check the path.')
    return str(name)


def _config(source: str, common: dict[str, Any]) -> Any:
    """The configuration, of a family that can be hooked."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, **common)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f'model must be "demo", a folder or a hub id that can be read; got {source!r}. {str(error).splitlines()[0]} '
            "Check the name, your connection (HF_HUB_OFFLINE), or download the folder first."
        ) from error
    family_of(config)
    return config


def _check_kind(source: str, config: Any, trust_remote_code: bool) -> None:
    """Refuse what is neither a vision-language nor a language model."""
    from transformers import AutoModelForImageTextToText

    if is_language_model(config) or type(config) in AutoModelForImageTextToText._model_mapping or trust_remote_code:
        return
    raise UnsupportedModelError(
        f"model must be a vision-language model; {source!r} is {config.model_type!r}, which transformers has no image-text-to-text class for. "
        f"Choose a family such as {', '.join(TESTED[:6])}, ..."
    )


@contextmanager
def _bars(show: bool) -> Iterator[None]:
    """transformers' own progress bars off while loading, unless they are wanted and stderr is a terminal; then as they were."""
    from transformers.utils import logging

    silence = logging.is_progress_bar_enabled() and not (show and sys.stderr is not None and sys.stderr.isatty())
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


def load(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    max_memory: dict[Any, str | int] | None = None,
    offload_folder: str | Path | None = None,
    quantize: Quantize | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    check: bool = True,
    progress: bool = True,
) -> HookedVLM:
    """Load a vision-language model with its processor, or a language model with its tokenizer (a `HookedLM`, whose prompts are words only).

    Args:
        name: "demo" (the bundled model), a folder, or a hub id such as "Qwen/Qwen2.5-VL-3B-Instruct". A folder of LoRA adapters (adapter_config.json and
            adapter_model.safetensors) loads the model that it names and adds the adapters into its weights.
        device: "cpu", "cuda", ...; default the CPU, or where `device_map` puts it.
        dtype: "auto" (as saved), "float32", "bfloat16", "float16".
        revision: Branch, tag or commit of a hub model.
        device_map: Passed to transformers, e.g. "auto" for several GPUs or offload (needs accelerate).
        max_memory: With device_map: how much each device may take, e.g. {0: "20GiB", "cpu": "60GiB"}; what is left over goes to the disk.
        offload_folder: With device_map: where layers on the disk are kept.
        quantize: "8bit" or "4bit": the decoder's linear maps in integers (needs bitsandbytes); pictures' tower and unembedding stay as they are.
        attn_implementation: The model's own attention while nothing is hooked, e.g. "sdpa" or "flash_attention_2".
        trust_remote_code: Run code from the checkpoint. Off unless you say so.
        check: The load-time check; see HookedVLM.
        progress: transformers' bars while weights are read, where stderr is a terminal.

    Raises:
        DeviceError, OptionError, CheckpointError, UnsupportedModelError, ParityError: before any long work where that can be known.
    """
    with _bars(progress):
        return _load(
            name, device=device, dtype=dtype, revision=revision, device_map=device_map, max_memory=max_memory, offload_folder=offload_folder, quantize=quantize,
            attn_implementation=attn_implementation, trust_remote_code=trust_remote_code, check=check,
        )  # fmt: skip


def _load(
    name: str | Path, *, device: str | None, dtype: str | torch.dtype, revision: str | None, device_map: Any, max_memory: Any, offload_folder: Any, quantize: Quantize | None,
    attn_implementation: str | None, trust_remote_code: bool, check: bool,
) -> HookedVLM:  # fmt: skip
    """`load`, with transformers' bars as they are."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if device is not None and device_map is not None:
        raise OptionError(f"device and device_map must not both be given; got {device!r} and {device_map!r}. Choose one.")
    target = check_device(device) if device is not None else None
    torch_dtype = check_dtype(dtype)
    big = check_placing(device_map, max_memory, offload_folder, quantize, device)
    path = demo_folder() if str(name) == "demo" else Path(name).expanduser()
    if is_adapter(path):
        if quantize is not None:
            raise OptionError(
                f"quantize must be left out for adapters, which are added into the weights; got {quantize!r}. Merge and save them first."
            )
        base = _load(
            base_of(path), device=device, dtype=dtype, device_map=device_map, max_memory=max_memory, offload_folder=offload_folder, attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code, revision=revision, check=False, quantize=None,
        )  # fmt: skip
        merged = read_adapters(base.hf, path)
        if isinstance(base, HookedLM):
            return HookedLM(merged, getattr(base.processor, "tokenizer", None), check=check, name=str(name), revision=base.revision)
        return HookedVLM(merged, base.processor, check=check, name=str(name), revision=base.revision)
    source = _source(name, path)
    common: dict[str, Any] = {"trust_remote_code": trust_remote_code, **({"revision": revision} if revision else {})}
    config = _config(source, common)
    _check_kind(source, config, trust_remote_code)
    extra: dict[str, Any] = {k: v for k, v in (("device_map", device_map), ("attn_implementation", attn_implementation)) if v is not None}
    extra |= big
    if is_language_model(config):
        return load_text(source, dtype=torch_dtype, target=target, check=check, name=str(name), common=common, extra=extra,
                         revision=str(revision or getattr(config, "_commit_hash", None) or ""))  # fmt: skip
    try:
        hf: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=torch_dtype, use_safetensors=True, **common, **extra)
        processor = AutoProcessor.from_pretrained(source, **common)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model {source!r} must load through transformers; it said: {str(error).splitlines()[0]} Check the files."
        ) from error
    if target is not None and quantize is None:
        hf = hf.to(target)
    label = "demo" if str(name) == "demo" else str(name)
    return HookedVLM(hf, processor, check=check, name=label, revision=str(revision or getattr(config, "_commit_hash", None) or ""))
