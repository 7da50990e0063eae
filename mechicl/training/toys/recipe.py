"""What a toy training is asked for: the task, the model, the optimizer, how long, when to look, when to stop.

A `ToyRecipe` is plain data: it goes to JSON and back, is compared when a run is resumed, and decides every number of the run. `recipe` has the
named ones, `set_fields` changes fields by their short names.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from mechicl.data.gaussian import MultimodalTask, Task, UnimodalTask
from mechicl.errors import OptionError

OPTIMIZERS = ("sgd", "adam", "adamw")
PARTS = ("decoder", "encoder", "projector")
KINDS: dict[str, type] = {"unimodal": UnimodalTask, "multimodal": MultimodalTask}
STOP = re.compile(r"\s*([\w.]+)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class ToyRecipe:
    """A toy training, whole: equal recipes give equal bits on one machine.

    `model`: settings of `mechicl.models.toys.model.toy_config`, with "preset" naming one of `mechicl.models.toys.presets` to start from; sizes that the
    task decides (labels, width of a token) are filled in. `encoder`: settings of `build_encoder` ("kind", ...); None puts the second modality's
    values into the projector as they are. `stage`: 1 is unimodal, 2 trains projector and decoder, 3 encoder, projector and decoder. `start`: a run
    folder (or a checkpoint file) of the earlier stage; with `early_fusion` there is none. `freeze`: parts that do not learn. `encoder_steps`: steps of training
    the encoder alone as a classifier, before stage 3. `points`: how many steps are measured, evenly spaced on a logarithmic scale. `probe_n`:
    sequences of each probe set. `stop`: a measure and its bound, such as "accuracy_ic>=0.95", looked at whenever the run is measured. `seed` decides the weights, the data and the
    probes; `task.seed` the world (class means and label vectors).
    """

    task: Task = field(default_factory=UnimodalTask)
    model: Mapping[str, Any] = field(default_factory=lambda: {"preset": "huang2026"})
    encoder: Mapping[str, Any] | None = None
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 1e-6
    batch: int = 128
    steps: int = 10_000
    stage: int = 1
    freeze: tuple[str, ...] = ()
    start: str | None = None
    early_fusion: bool = False
    encoder_steps: int = 0
    seed: int = 0
    points: int = 40
    probe_n: int = 1000
    stop: str | None = None
    name: str = "toy"

    def __post_init__(self) -> None:
        _check(self)

    @property
    def multimodal(self) -> bool:
        """Whether the task has a second modality."""
        return isinstance(self.task, MultimodalTask)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `from_json` is its inverse."""
        kind = "multimodal" if self.multimodal else "unimodal"
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["task"] = {"kind": kind, **asdict(self.task)}
        return json.loads(json.dumps(plain))

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ToyRecipe:
        """The recipe that `to_json` wrote.

        Raises:
            OptionError: a field that no recipe has, or a value out of range.
        """
        given = dict(data)
        try:
            task = dict(given.pop("task"))
            kind = KINDS[task.pop("kind")]
            pairs = {f.name for f in fields(kind) if str(f.type).startswith("tuple")}
            task = {name: tuple(value) if name in pairs and value is not None else value for name, value in task.items()}
            return ToyRecipe(task=kind(**task), **{**given, "freeze": tuple(given.get("freeze", ()))})
        except (KeyError, TypeError) as error:
            raise OptionError(f"a recipe must be what to_json wrote; got fields {sorted(data)} ({error}). Write it again.") from error

    def flat(self) -> dict[str, Any]:
        """Every field under its dotted name, such as "task.K": what a run folder compares."""
        out: dict[str, Any] = {}
        for name, value in self.to_json().items():
            if isinstance(value, dict):
                out |= {f"{name}.{inner}": v for inner, v in value.items()}
            else:
                out[name] = value
        return out


def _check(recipe: ToyRecipe) -> None:
    def refuse(name: str, rule: str, do: str) -> None:
        raise OptionError(f"{name} must be {rule}; got {getattr(recipe, name)!r}. {do}")

    for name, least in (("batch", 1), ("steps", 0), ("points", 2), ("probe_n", 2), ("encoder_steps", 0), ("seed", 0)):
        value = getattr(recipe, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            refuse(name, f"a whole number of at least {least}", "Give one.")
    for name in ("lr", "weight_decay"):
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            refuse(name, "a number of at least 0", "Give one.")
    if recipe.optimizer not in OPTIMIZERS:
        refuse("optimizer", f"one of {', '.join(OPTIMIZERS)}", "Pick one of them.")
    if recipe.stage not in (1, 2, 3):
        refuse("stage", "1, 2 or 3", "1: one modality; 2: projector and decoder; 3: encoder, projector and decoder.")
    if (recipe.stage == 1) == recipe.multimodal:
        refuse("stage", "1 for a unimodal task, 2 or 3 for a multimodal one", "Change the task or the stage.")
    if not set(recipe.freeze) <= set(PARTS):
        refuse("freeze", f"some of {', '.join(PARTS)}", "Name parts of the model.")
    if recipe.stage == 3 and recipe.encoder is None:
        refuse("encoder", "given in stage 3", 'E.g. {"kind": "mlp"}, or use stage 2.')
    if recipe.early_fusion and recipe.start is not None:
        refuse("start", "left out with early_fusion, which skips the earlier stage", "Drop one of the two.")
    if recipe.stop is not None:
        parse_stop(recipe.stop)


def parse_stop(text: str) -> tuple[str, str, float]:
    """ "accuracy_ic>=0.95" -> ("accuracy_ic", ">=", 0.95).

    Raises:
        OptionError: not a measure, a comparison and a number.
    """
    found = STOP.fullmatch(text)
    if found is None:
        raise OptionError(f'stop must be a measure, >= or <=, and a number; got {text!r}. E.g. "accuracy_ic>=0.95".')
    return found[1], found[2], float(found[3])


def measuring_steps(recipe: ToyRecipe) -> tuple[int, ...]:
    """The steps at which a run is measured and a checkpoint kept: 0, then evenly on a logarithmic scale over three decades, the last step included."""
    if recipe.steps == 0:
        return (0,)
    first = max(1.0, recipe.steps / 1000)
    return tuple(sorted({0, *(round(x) for x in np.geomspace(first, recipe.steps, max(recipe.points - 1, 1))), recipe.steps}))


def together_key(recipe: ToyRecipe) -> str:
    """Equal for recipes that `train_many` can train in one batched step: same shapes, same optimizer, same schedule of steps and data sizes.

    Free to differ: seeds, lr, weight_decay, stop, name, start, and every setting of the task that changes no shape (B, p_B, eps, alpha, K, ...),
    but p_C = 0 against more: novel classes are new in every batch, the others are drawn several batches at once.
    """
    plain = recipe.to_json()
    task = plain["task"]
    shaping = ("kind", "L", "N", "D", "D1", "D2", "second", "labels", *(("K2",) if recipe.encoder is not None else ()))
    shapes = {name: task[name] for name in shaping if name in task} | {"novel": task["p_C"] > 0}
    kept = {k: v for k, v in plain.items() if k not in ("task", "seed", "lr", "weight_decay", "stop", "name", "start")}
    return json.dumps([kept, shapes], sort_keys=True)


def set_fields(recipe: ToyRecipe, changes: Mapping[str, Any]) -> ToyRecipe:
    """The recipe with fields changed, all at once, by short name ("K", "positions", "lr") or dotted ("task.K", "model.positions", "encoder.kind").

    A short name is looked for in the recipe, then the task, then the model's settings. "seed" sets the recipe's seed and the task's: another run in
    another world; "task.seed" sets the world's alone. "encoder" takes a kind, settings, or None.

    Raises:
        OptionError: a name that none of them has, or a value out of range.
    """
    own: dict[str, Any] = {}
    task: dict[str, Any] = {}
    model: dict[str, Any] = {}
    encoder: dict[str, Any] = {}
    for name, value in changes.items():
        if name == "seed":
            own["seed"] = task["seed"] = value
        elif name == "encoder":
            own["encoder"] = {"kind": value} if isinstance(value, str) else value
        else:
            owner, short = _owner(recipe, name)
            {"recipe": own, "task": task, "model": model, "encoder": encoder}[owner][short] = value
    if "freeze" in own:
        own["freeze"] = (own["freeze"],) if isinstance(own["freeze"], str) else tuple(own["freeze"])
    if task:
        own["task"] = replace(recipe.task, **task)
    if model:
        own["model"] = {**recipe.model, **model}
    if encoder:
        own["encoder"] = {**(own.get("encoder", recipe.encoder) or {}), **encoder}
    return replace(recipe, **own)


def _owner(recipe: ToyRecipe, name: str) -> tuple[str, str]:
    known = field_names(recipe)
    if "." in name:
        owner, short = name.split(".", 1)
        if short in known.get(owner, ()) or (owner == "encoder" and short):
            return owner, short
    else:
        for owner, names in known.items():
            if name in names:
                return owner, name
    everything = [short for names in known.values() for short in names]
    everything += [f"{owner}.{short}" for owner, names in known.items() for short in names]
    near = difflib.get_close_matches(name, everything, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(near)}?" if near else f"E.g. {', '.join(sorted(known['task'])[:6])}, lr, steps, positions."
    raise OptionError(f"a field must be one of the recipe's, the task's or the model's; got {name!r}. {hint}")


def field_names(recipe: ToyRecipe) -> dict[str, list[str]]:
    """The names that `set_fields` takes, by owner: "recipe", "task", "model"."""
    from mechicl.training.toys.build import model_settings

    return {
        "recipe": [f.name for f in fields(recipe) if f.name not in ("task", "model", "encoder")],
        "task": [f.name for f in fields(recipe.task)],
        "model": list(model_settings()),
    }


_CPU: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 1e-6, "batch": 128, "steps": 3000, "points": 30, "probe_n": 512}

PRESETS: dict[str, dict[str, Any]] = {
    # the paper's own (METHODS A3), hours on a CPU
    "huang2026": {"optimizer": "sgd", "lr": 1e-3, "weight_decay": 1e-6, "batch": 128, "steps": 300_000, "points": 60, "probe_n": 1000,
                  "task": {"K": 8192, "B": 2}, "model": {"preset": "huang2026"}},
    "huang2026_multimodal": {"optimizer": "sgd", "lr": 1e-3, "weight_decay": 1e-6, "batch": 128, "steps": 80_000, "points": 60, "probe_n": 1000,
                             "stage": 2, "task": {"kind": "multimodal", "K1": 8192, "K2": 256, "B": 4}, "model": {"preset": "huang2026"}},
    # the minimal model of Reddy 2024 (METHODS E) on its own task sizes
    "reddy2024": {"optimizer": "sgd", "lr": 1e-2, "weight_decay": 1e-6, "batch": 128, "steps": 200_000, "points": 60, "probe_n": 1000,
                  "task": {"K": 1024, "D": 63, "B": 2}, "model": {"preset": "reddy2024"}},
    "modern": {**_CPU, "optimizer": "adamw", "weight_decay": 1e-2, "task": {"K": 1024, "B": 2}, "model": {"preset": "modern"}},
    # short, for a laptop: Adam in place of SGD, so that a hundredth of the steps do
    "cpu": {**_CPU, "task": {"K": 8192, "B": 4}, "model": {"preset": "huang2026"}},
    "cpu_multimodal": {**_CPU, "stage": 2, "steps": 2000, "task": {"kind": "multimodal", "K1": 8192, "K2": 256, "B": 4}, "model": {"preset": "huang2026"}},
}  # fmt: skip
"""The named recipes. "cpu" and "cpu_multimodal" are ours, shortened to finish in minutes on a laptop, and must be called so wherever they are shown."""


def recipe(name: str = "cpu", **changes: Any) -> ToyRecipe:
    """A named recipe, with fields changed as `set_fields` does.

    Raises:
        OptionError: no such recipe, no such field, or a value out of range.
    """
    if name not in PRESETS:
        raise OptionError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}. Pick one of them.")
    given = dict(PRESETS[name])
    task = dict(given.pop("task"))
    kind = KINDS[task.pop("kind", "unimodal")]
    made = ToyRecipe(task=kind(**task), model=dict(given.pop("model")), name=name, **given)
    return set_fields(made, changes) if changes else made


def from_words(name: str, changes: Sequence[str] = (), *, seed: int = 0, stop: str | None = None) -> ToyRecipe:
    """A named recipe with changes as a command line has them: "K=1024", "positions=alibi", "freeze=decoder,encoder", "stop=none".

    Raises:
        OptionError: a change that is not NAME=VALUE, or as `set_fields`.
    """
    given: dict[str, Any] = {"seed": seed} | ({} if stop is None else {"stop": stop})
    for change in changes:
        key, sign, value = change.partition("=")
        if not sign or not key.strip() or not value.strip():
            raise OptionError(f"set must be NAME=VALUE; got {change!r}. E.g. --set K=1024 --set positions=alibi.")
        given[key.strip()] = _value(key.strip(), value.strip())
    return recipe(name, **given)


def _value(key: str, text: str) -> Any:
    if key == "freeze":
        return tuple(part.strip() for part in text.split(",") if part.strip())
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words and not (key == "positions" and text == "none"):
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text
