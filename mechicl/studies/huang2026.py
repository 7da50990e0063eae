"""The production protocol of Huang et al. 2026 on any vision-language model, and what it lacks: one call, one folder, one page.

    rank       PH and IH as published, ours beside them, on some episodes
    knock      the top heads off on others, beside random heads, zero-shot, permuted labels; dose curves
    compare    with the published rankings and numbers, where the model is the published one
    lora       the published fine-tuning, the ranked heads followed
    report     one HTML page

A study that is killed goes on where it was, within a part too: the same call with the same `out`. Ranking and knock-outs go through a crew
(`mechicl.analysis.spread`): of this process, or of several workers, with the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mechicl.analysis.feed import provenance
from mechicl.analysis.heads.scoring import attention_by_role
from mechicl.errors import EpisodeError, OptionError, RenderError
from mechicl.prompts.episode import Episode
from mechicl.results import Head, HeadScores, ProtocolStudy, StudyCost
from mechicl.studies.crew import StudyCrew
from mechicl.studies.huang2026_heads import IH, PH, rank_heads
from mechicl.studies.huang2026_knockouts import INTACT, knock_out
from mechicl.studies.huang2026_sets import Plan, plan_sets
from mechicl.studies.huang2026_tuning import TuningOptions, tune
from mechicl.studies.keep import Memory, StudyFolder
from mechicl.studies.published import match_rankings, match_scores, numbers_beside, published

STUDY = "huang2026"
PUBLISHED_TOP = 5
SKIPPABLE = ("lora", "dose", "ours")
REPORT, TABLE = "study.html", "study.csv"
Part = Literal["lora", "dose", "ours"]


@dataclass(frozen=True)
class Options:
    """What the study does. Defaults: the published protocol, with enough episodes for an interval to mean something.

    shots: of each class. rank, episodes: episodes to rank heads on, and others to switch them off on (published: 16, and 50 of which these 16 are the
    first). top: heads of a set; None: the published 5, fewer in a model of few heads, which would leave none to compare with. n_random, dose_draws: random sets beside each set, and beside each point of a dose curve. skip: parts left out, of
    `SKIPPABLE`. size: longest side of the pictures, pixels; None as they are. lora: the fine-tuning.
    """

    shots: int = 2
    rank: int = 32
    episodes: int = 100
    top: int | None = None
    n_random: int = 20
    dose_draws: int = 10
    skip: tuple[Part, ...] = ()
    size: int | None = None
    seed: int = 0
    lora: TuningOptions = field(default_factory=TuningOptions)

    def __post_init__(self) -> None:
        for name, least in (("shots", 1), ("rank", 4), ("episodes", 4), ("top", 1), ("n_random", 0), ("dose_draws", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise OptionError(f"{name} must be at least {least}; got {getattr(self, name)}. Raise it.")
        strange = [part for part in self.skip if part not in SKIPPABLE]
        if strange:
            raise OptionError(
                f"skip must be among {', '.join(SKIPPABLE)}; got {strange[0]!r}. Ranking and knock-outs are the study itself."
            )

    @property
    def needed(self) -> int:
        """How many episodes the study takes."""
        tuned = 0 if "lora" in self.skip else self.lora.train + self.lora.held_out
        return max(self.rank + self.episodes, tuned)

    def to_json(self) -> dict[str, Any]:
        """For the study's folder."""
        return asdict(self)


def study_episodes(data: str | os.PathLike[str] | Sequence[Episode] | None, options: Options) -> tuple[list[Episode], str]:
    """The episodes of a study, in the order in which it uses them, and what they are called.

    Args:
        data: A folder of VL-ICL Bench (or its open_mi); episodes of your own; None for generated pictures of concepts nobody has met, with the
            published prompt.
        options: How many, how many shots, how large, which seed.

    Raises:
        OptionError, ImageError: the folder holds too few queries or cannot be used.
        EpisodeError: too few episodes of your own.
    """
    prompt = published(STUDY)["protocol"]
    if data is None:
        from mechicl.data import concepts

        drawn = concepts.draw(options.needed, classes=2, shots=options.shots, size=options.size or 28, seed=options.seed)
        return [
            replace(e, instruction=prompt["system"], question=prompt["question"]) for e in drawn
        ], f"generated concepts, 2 classes x {options.shots}"
    if isinstance(data, str | os.PathLike):
        from mechicl.data.vl_icl import load_vl_icl

        found = load_vl_icl(Path(data), "open_mi", size=options.size).episodes(options.needed, shots=options.shots, seed=options.seed)
        order = np.random.default_rng([options.seed, 5]).permutation(len(found))  # they come in the file's order, class by class
        return [found[int(i)] for i in order], f"VL-ICL open_mi, 2 classes x {options.shots}"
    if len(data) < options.needed:
        raise EpisodeError(
            f"data must hold {options.needed} episodes, {options.rank} to rank heads on and others to test them; got {len(data)}. Give more, or ask for fewer."
        )
    return list(data[: options.needed]), f"given episodes, {len(data[0].shots)} examples"  # fmt: skip


def run(
    model: Any,
    data: str | os.PathLike[str] | Sequence[Episode] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    options: Options | None = None,
    device: str | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    workers: int = 0,
    address: str | None = None,
    command: str = "",
    task: str = "",
    name: str = "",
    progress: bool = True,
    **changes: Any,
) -> ProtocolStudy:
    """Run the study, or go on with it.

    Args:
        model: "demo", a folder, a hub id, or a loaded HookedVLM.
        data: See `study_episodes`.
        out: The study's folder: finished parts, study.csv, study.html. None keeps nothing (then the fine-tuning is left out).
        options: What it does; or name single options: `run("demo", episodes=50, skip=("lora",))`.
        device, dtype: Where and how the model is loaded.
        batch_size: Prompts per forward pass; also the episodes of a shard, which is what a killed study loses at most.
        workers: Processes that share the episodes of ranking and knock-outs, each with the model; 0: this one. The numbers are the same for any number.
        address: A Ray cluster for them ("auto", host:port); None: this machine.
        command: The line that makes the report again, to stand in it.
        task: What episodes of your own are called.
        name: What a loaded model was loaded by: workers load it by that, and the fine-tuning loads its own copy instead of copying it in memory.
        progress: Show bars.

    Returns:
        ProtocolStudy.

    Raises:
        OptionError, EpisodeError: an option out of range, too few episodes, or workers for a model without a name, before the model runs.
        CheckpointError: `out` holds another study, or a damaged part.
        OutputPathError: `out` cannot be written.

    Source:
        Huang et al. 2026 (arXiv 2601.20796), scripts of the appendix on Qwen2.5-VL-3B. What differs is said in docs/studies.md.
    """
    asked = _options(options, changes)
    source = os.fspath(model) if isinstance(model, str | os.PathLike) else name
    if workers and not source:
        raise OptionError(
            f"model must be a name or a folder that every worker can load; got {type(model).__name__}. Give its name=, or workers=0."
        )
    if out is None and "lora" not in asked.skip:
        asked = replace(asked, skip=(*asked.skip, "lora"))
    episodes, called = study_episodes(data, asked)
    task = task or called
    loaded = _load(model, device, dtype)
    episodes, note = fitted(loaded, episodes)
    folder = Memory() if out is None else StudyFolder(out, {"study": STUDY, **_asked(loaded, episodes, asked, task, batch_size)})
    with StudyCrew(loaded, source, folder, batch_size, {"workers": workers, "address": address, "device": device, "dtype": dtype}) as crew:
        study = _Work(loaded, crew, episodes, task, asked, folder, batch_size, progress, note).study(source or loaded)
    if out is not None:
        from mechicl.views.protocol_page import write_protocol_page

        assert isinstance(folder, StudyFolder)
        folder.write_table(TABLE, study.to_frame())
        write_protocol_page(Path(out) / REPORT, study, command=command)
    return study


def fitted(model: Any, episodes: Sequence[Episode]) -> tuple[list[Episode], str]:
    """Episodes whose question this model's template can write, and what was changed: some templates take the space off the end of "This is a "."""
    first = episodes[0]
    try:
        model.render([first])
    except RenderError:
        if first.question == first.question.strip():
            raise
        changed = [replace(e, question=e.question.strip()) for e in episodes]
        model.render(changed[:1])
        return (
            changed,
            f"This model's template takes spaces off the ends of a turn: the question is {changed[0].question!r}, published {first.question!r}.",
        )
    return list(episodes), ""


def _options(options: Options | None, changes: Mapping[str, Any]) -> Options:
    unknown = [name for name in changes if name not in Options.__dataclass_fields__]
    if unknown:
        raise OptionError(f"options must be among {', '.join(Options.__dataclass_fields__)}; got {unknown[0]!r}. Check its name.")
    return replace(options or Options(), **changes)


def _load(model: Any, device: str | None, dtype: str) -> Any:
    if not isinstance(model, str | os.PathLike):
        return model
    from mechicl.models.load import load

    return load(os.fspath(model), device=device, dtype=dtype)


def _asked(model: Any, episodes: Sequence[Episode], options: Options, task: str, batch_size: int) -> dict[str, Any]:
    """What decides the study's numbers."""
    from mechicl.training.adapting.data import about
    from mechicl.training.adapting.parts import fingerprint

    return {
        "model": str(model.cfg.model_name).rstrip("/").rsplit("/", 1)[-1], "weights": fingerprint(model.hf) if hasattr(model, "hf") else "",
        "dtype": str(model.describe().get("dtype", "")), "task": task, "episodes": about(list(episodes)), "batch_size": batch_size, "options": options.to_json(),
    }  # fmt: skip


def top_of(model: Any, options: Options) -> int:
    """Heads of a set."""
    return options.top or max(1, min(PUBLISHED_TOP, _n_heads(model) // 8))


def _n_heads(model: Any) -> int:
    return int(model.cfg.n_layers * model.cfg.n_heads)


class _Work:
    """The parts of one study, each made once."""

    def __init__(
        self,
        model: Any,
        crew: StudyCrew,
        episodes: list[Episode],
        task: str,
        options: Options,
        folder: StudyFolder | Memory,
        size: int,
        progress: bool,
        note: str = "",
    ) -> None:
        self.model, self.crew, self.folder, self.progress = model, crew, folder, progress
        self.task, self.options, self.note = task, options, note
        self.top = top_of(model, options)
        self.rank, self.prove = episodes[: options.rank], episodes[options.rank : options.rank + options.episodes]
        self.episodes = episodes
        self.common: dict[str, Any] = {"seed": options.seed, "batch_size": size, "task": task, "progress": progress}  # fmt: skip

    def study(self, name: Any) -> ProtocolStudy:
        """All parts, in order."""
        seconds: dict[str, float] = {}
        heads, seconds["ranking"] = self.folder.part("heads", lambda: rank_heads(self.crew.at_work(), self.rank, **self.common))
        roles, seconds["attention by role"] = self.folder.part(
            "roles", lambda: attention_by_role(self.crew.at_work(), self.rank, **self.common)
        )
        plan = self.plan(heads)
        (off, doses), seconds["knock-outs"] = self.folder.part(
            "knock_outs", lambda: knock_out(self.crew.at_work(), self.prove, plan, tokenizer=self.tokenizer(), **self.common)
        )
        self.crew.close()
        tuning = None
        if "lora" not in self.options.skip:
            tuning, seconds["fine-tuning"] = self.folder.part("tuning", lambda: self.tuning(name, heads))
        made = provenance(self.model, task=self.task, seed=self.options.seed, options=self.options.to_json())
        numbers = {name: off[row].open for name, row in self._names(off).items()}
        pairs = ((PH, "previous_token"), (IH, "induction"), (IH, "induction_label"))
        return ProtocolStudy(
            study=STUDY, heads=heads, roles=roles, knock_outs=off, doses=doses,
            rankings=match_rankings(STUDY, heads, made.model, {"PH": PH, "IH": IH}, seed=self.options.seed),
            numbers=numbers_beside(STUDY, numbers, made.model), agreement=tuple(match_scores(a, b, heads, top=self.top, seed=self.options.seed) for a, b in pairs),
            tuning=tuning, seconds=seconds, n_rank=heads.n, n=off.n, skipped=(*heads.skipped, *off.skipped), skipped_parts=tuple(self.options.skip),
            provenance=made, notes=tuple(dict.fromkeys((*self.notes(), *heads.notes, *off.notes))),
        )  # fmt: skip

    def tokenizer(self) -> Any:
        """The model's; None where it has none."""
        return getattr(getattr(self.model, "renderer", None), "tokenizer", None)

    def plan(self, heads: HeadScores) -> Plan:
        """Which heads go off."""
        return plan_sets(
            self.model, rankings(heads, ours="ours" not in self.options.skip), top=self.top, n_random=self.options.n_random,
            dose=() if "dose" in self.options.skip else ("PH", "IH"), dose_draws=self.options.dose_draws, seed=self.options.seed,
        )  # fmt: skip

    def notes(self) -> tuple[str, ...]:
        """What differs from the published protocol because of the model."""
        said = (self.note,) if self.note else ()
        if self.options.top is not None or self.top == PUBLISHED_TOP:
            return said
        return (
            *said,
            f"Sets are of {self.top} heads, not the published {PUBLISHED_TOP}: the model has {_n_heads(self.model)} in all.",
        )

    def tuning(self, name: Any, heads: HeadScores) -> Any:
        """The fine-tuning, on the first episodes; measured on the last ones, which it does not see."""
        options = self.options.lora
        assert isinstance(self.folder, StudyFolder)
        tops = {score: heads.top(score, self.top) for score in (PH, IH, "previous_token", "induction")}
        train, held_out = self.episodes[: options.train], self.episodes[len(self.episodes) - options.held_out :]
        return tune(self.model, name, train, held_out, tops, options, self.folder.out / "lora", **self.common)

    def _names(self, off: Any) -> dict[str, str]:
        """A published number's name -> the row of the table that it is about."""
        found = {"intact": INTACT}
        for row in off.rows:
            if row.kind == "published":
                short = " and ".join(part for part in ("PH", "IH") if part in row.name.split())
                found[f"top {short} off"] = row.name
        return found


def rankings(heads: HeadScores, *, ours: bool) -> dict[str, tuple[Literal["published", "ours"], str, list[Head]]]:
    """What ranks heads: short name -> (whose, the rule, heads best first)."""
    found: dict[str, tuple[Literal["published", "ours"], str, list[Head]]] = {}
    size = heads[PH].value.size
    for short, kind, score, rule in (
        ("PH", "published", PH, "mean attention to the token before, whole prompt"),
        ("IH", "published", IH, "attention to the answer's occurrences minus all other positions"),
        ("previous-token", "ours", "previous_token", "attention to the token before, text rows"),
        ("induction", "ours", "induction", "attention to right minus wrong labels"),
    ):
        if kind == "published" or ours:
            found[short] = (kind, rule, heads.top(score, size))  # type: ignore[assignment]
    return found


def preview_study(
    model: Any,
    data: str | os.PathLike[str] | Sequence[Episode] | None = None,
    *,
    options: Options | None = None,
    device: str | None = None,
    dtype: str = "auto",
    batch_size: int = 8,
    **changes: Any,
) -> StudyCost:
    """What the study would take, from a batch of episodes that is timed. Arguments as in `run`."""
    from mechicl.studies.huang2026_cost import cost

    asked = _options(options, changes)
    episodes, _ = study_episodes(data, asked)
    loaded = _load(model, device, dtype)
    return cost(loaded, fitted(loaded, episodes)[0], asked, batch_size)
