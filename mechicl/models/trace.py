"""nnsight's one home: free exploration of the same Hugging Face model, the independent path that mechicl's hooks are tested against, and runs on a server.

    with model.trace(batch):                                        # here, on the model in memory
        z = model.nnsight.get(o_proj_path(model, 3)).input.save()   # what the heads of layer 3 hand over, [batch, pos, head * d_head]
    with model.trace(batch, remote=True):                           # on a server that has the model; nnsight's key is needed
        z = model.remote.get(o_proj_path(model, 3)).input.save()

Reads must follow the order of execution. A remote trace sends the prompt as mechicl rendered it (token ids, pixels) and the body of the block; no weights travel,
and the server's own copy of the model runs. Read it through `model.remote`: nnsight keeps one tree of modules for each model it runs, here or there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from mechicl.errors import OptionError, UnsupportedModelError

TASKS = {True: "image-text-to-text", False: "text-generation"}
"""What the server is asked to load the model for: whether it takes pictures -> the task's name."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def envoy(hf: Any) -> Any:
    """nnsight's wrapper of a Hugging Face model in memory. Reads must follow the order of execution."""
    from nnsight import NNsight

    return NNsight(hf)


def remote_envoy(name: str, *, pictures: bool = True, revision: str | None = None) -> Any:
    """nnsight's wrapper of a model on the hub, without weights: what a remote run is addressed to.

    Args:
        name: Its hub id.
        pictures: Whether it takes pictures.
        revision: None for the one that the server has.

    Raises:
        OptionError: the name is a folder, the bundled model, or anything else that no server could have.
    """
    if os.path.isdir(name) or not HUB_ID.fullmatch(name):
        raise OptionError(
            f"model must be on the hub to be traced remotely; got {name!r}, which only this machine has. Load it by its hub id (owner/name), or trace it here without remote=."
        )
    from nnsight.modeling.transformers import TransformersModel

    return TransformersModel(name, task=TASKS[pictures], revision=revision)


def check_key() -> None:
    """Raises OptionError where nnsight has no key for its server."""
    from nnsight import CONFIG

    if not (CONFIG.API.APIKEY or os.environ.get("NDIF_API_KEY")):
        raise OptionError(
            "remote must have a key to the server that runs the model; nnsight has none. Set NDIF_API_KEY, or call nnsight.CONFIG.set_default_api_key(key), or trace here without remote=."
        )


def open_trace(local: Any, remote: Any, inputs: Mapping[str, Any], *, where: Any = False, **options: Any) -> Any:
    """A trace on the model in memory, or, with `where`, nnsight's `remote`, on a server.

    Args:
        local: The envoy of the model in memory.
        remote: Makes the envoy of the model on the hub when it is needed.
        inputs: What goes into the model.
        where: False here; True on nnsight's server; a host's address; "local": nnsight's rehearsal of a remote run in this process, which needs no key.
        options: For nnsight's `trace`: `blocking`, `job_id`, `verbose`, `backend`, ...

    Raises:
        OptionError: no key, or a model that is not on the hub.
    """
    if not where:
        return local.trace(**inputs, **options)
    there = remote()
    if where != "local":
        check_key()
    moved = {key: value.cpu() if hasattr(value, "cpu") else value for key, value in inputs.items()}
    return there.trace(**moved, remote=where, **options)


def path_of(hf: Any, module: Any) -> str:
    """A module's path in the Hugging Face model, as `model.nnsight.get(path)` wants it.

    Raises:
        UnsupportedModelError: it is not in the model.
    """
    for path, one in hf.named_modules():
        if one is module:
            return path
    raise UnsupportedModelError(f"module must be part of the model; got {type(module).__name__}. Take it from model.hf.")


def o_proj_path(model: Any, layer: int) -> str:
    """Path of a layer's output projection, whose input is what its heads hand over: head h has columns h * d_head to (h + 1) * d_head.

    Raises:
        UnsupportedModelError: the layer has none; says why.
    """
    part = model.anatomy.layers[layer]
    if part.o_proj is None:
        reason = part.reasons.get("attn.hook_z", "its heads' outputs meet no linear map")
        raise UnsupportedModelError(f"layer {layer} must have an output projection; {reason}. Choose another layer.")
    return path_of(model.hf, part.o_proj)


def attention_path(model: Any, layer: int) -> str:
    """Path of a layer's attention module, whose second output is the pattern [batch, head, dest, src] where the model runs with attn_implementation "eager"."""
    part = model.anatomy.layers[layer]
    if part.attention is None:
        raise UnsupportedModelError(f"layer {layer} must have attention; it has none. Choose another layer.")
    return path_of(model.hf, part.attention)
