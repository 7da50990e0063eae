"""What does each link-context strategy teach a model that never met a new name? python -m benchmarks.link --out DIR [--scale micro|small|full] [--seeds 3]

A base of the bundled architecture is trained on repeated sequences and on naming pictures by names that never change; no prompt of its training gives a class a
new name. Then each strategy fine-tunes it (whole decoder and projector, tower frozen), with hard negatives and with random ones, the control. All are asked about
concepts that no training showed, 0 to `shots` examples of each class, against hard and random negatives; accuracy is among the two names, chance one half.

Resumable: what is finished is kept in DIR, one row per cell in DIR/rows.jsonl; the same command goes on. The scale "full" takes hours on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

import mechicl
from benchmarks.measure import machine, table
from mechicl.analysis.icl import icl_accuracy
from mechicl.analysis.link.neighbours import class_neighbours
from mechicl.analysis.trainings.bands import runs_estimate
from mechicl.data.link_context import SHORT, Pool, generated_pool, link_episodes
from mechicl.prompts.episode import Episode, Shot
from mechicl.training.adapting.adapt import adapt
from mechicl.training.adapting.data import Feed
from mechicl.training.adapting.folder import replaced
from mechicl.training.adapting.loop import Course, Loop, start
from mechicl.training.adapting.measure import Probe
from mechicl.training.organisms import save
from mechicl.training.runs import Run
from mechicl.training.stages import PICTURES, REPEAT, REPEATS, Plan, Stage
from mechicl.training.vlm import train

STRATEGIES = ("2-way", "2-way-random", "2-way-weight", "mix")
NEGATIVES = ("hard", "random")


@dataclass(frozen=True)
class Scale:
    """Sizes of an experiment: classes and pictures, steps of the base's two parts and of each fine-tuning, episodes of an evaluation."""

    groups: int
    per_class: int
    shots: int
    repeats: int
    naming: int
    steps: int
    batch: int
    asked: tuple[int, ...]
    n: int
    size: int = 28
    lr: float = 1e-3


SCALES = {
    "micro": Scale(4, 6, 2, 20, 20, 10, 4, (0, 2), 16),
    "small": Scale(20, 16, 4, 600, 600, 400, 16, (0, 1, 2, 4), 128),
    "full": Scale(20, 32, 16, 3000, 4000, 3000, 32, (0, 1, 2, 4, 8, 16), 400),
}


@dataclass(frozen=True)
class Naming:
    """Pictures by names that never change, alone or behind examples drawn without regard to the query."""

    pool: Pool
    most: int = 4

    @property
    def about(self) -> dict[str, Any]:
        """For a run's configuration."""
        return {"task": "naming", "classes": len(self.pool), "most": self.most}

    def __call__(self, n: int, seed: int) -> list[Episode]:
        """n episodes."""
        return [self._one(random.Random(f"{seed} {k}")) for k in range(n)]

    def _one(self, rng: random.Random) -> Episode:
        classes = [rng.choice(self.pool.classes) for _ in range(1 + (rng.randint(0, self.most) if rng.random() < 0.5 else 0))]
        *shots, query = (Shot(c.name, (self.pool.picture(c.key, rng.randrange(len(c.images))),), item=c.key) for c in classes)
        names = dict.fromkeys([query.label, *(shot.label for shot in shots), *(c.name for c in self.pool.classes[:2])])
        return Episode(tuple(shots), query, tuple(names), SHORT.instruction, SHORT.question)


def base(out: Path, scale: Scale, pool: Pool, threads: int | None) -> Path:
    """The model that never met a new name: trained once, then found again."""
    target = out / "base"
    if target.is_dir():
        return target
    stage = Stage("repeated sequences", (REPEAT,), REPEATS, 0.97, scale.repeats)
    heads = replace(PICTURES, n=8)
    plan = Plan((stage,), growth_points=2, heads=heads, vision={"hidden_size": 80, "intermediate_size": 160})
    started = train("qwen2_5_vl", out=out / "repeats", recipe=plan, resume=True, threads=threads)
    model = mechicl.load(started)
    model.hf.requires_grad_(True)  # the base learns to see, too
    course = Course(scale.naming, 2e-3, 2 * scale.batch, weight_decay=0.01)
    run = Run.open(out / "naming", {"course": course.to_json(), "classes": len(pool)}, resume=True)
    loop = Loop(model.hf, model.renderer, Feed(Naming(pool), course.batch), course, run, start("cpu", projector=False))
    while loop.step < course.steps:
        row = loop.take_step()
        if loop.step % 20 == 0 or loop.step == course.steps:
            loop.save()
            run.log({"step": loop.step, **row})
            print(f"naming {loop.step}/{course.steps}: loss {row['loss']:.3f}", flush=True)
    with replaced(target) as path:
        save(model.hf.eval(), model.processor, path)
    return target


def questions(scale: Scale, pool: Pool, alike: Any) -> dict[tuple[int, str], list[Episode]]:
    """The fixed episodes of an evaluation, by shots and by kind of negatives."""
    found = {}
    for negatives in NEGATIVES:
        few = link_episodes(pool, scale.n, shots=max(scale.asked), neighbours=alike if negatives == "hard" else None, prompt=SHORT, seed=97)
        for shots in scale.asked:
            found[shots, negatives] = [fewer(episode, shots) for episode in few]
    return found


def fewer(episode: Episode, shots: int) -> Episode:
    """The first `shots` examples of each class, in the order they had: the same queries at every number of shots."""
    left = dict.fromkeys(episode.candidates, shots)
    kept = []
    for shot in episode.shots:
        if left[shot.label]:
            left[shot.label] -= 1
            kept.append(shot)
    return replace(episode, shots=tuple(kept))


def ask(folder: Path | str, asked: dict[tuple[int, str], list[Episode]], **cell: Any) -> list[dict[str, Any]]:
    """One row per number of shots and kind of negatives."""
    model = mechicl.load(folder)
    rows = []
    for (shots, negatives), episodes in asked.items():
        got = icl_accuracy(model, episodes, zero_shot=False, batch_size=16, progress=False) if shots else bare(model, episodes)
        positive = got.answers == 0
        rows.append(
            {**cell, "shots": shots, "asked_negatives": negatives, "accuracy": got.accuracy.value, "low": got.accuracy.low, "high": got.accuracy.high,
             "n": got.n, "positive_recall": float(got.correct[positive].mean()), "negative_recall": float(got.correct[~positive].mean()),
             "cla": got.cla.value}
        )  # fmt: skip
    return rows


def bare(model: Any, episodes: Sequence[Episode]) -> Any:
    """Accuracy without an example, which `icl_accuracy` refuses for episodes but takes as a rendered batch."""
    return icl_accuracy(model, model.render(list(episodes)), zero_shot=False, batch_size=16, progress=False)


def cells(out: Path, scale: Scale, seeds: int, strategies: Sequence[str], threads: int | None, start_from: str | None) -> pd.DataFrame:
    """Every cell that is not there yet, and all rows."""
    known = generated_pool(0, scale.groups, scale.per_class, scale.size, split="train", names="made-up")
    fresh = generated_pool(
        1, min(scale.groups, 10), max(scale.per_class, max(scale.asked) + 1), scale.size, split="held_out", names="made-up"
    )
    folder = start_from or base(out, scale, known, threads)
    model = mechicl.load(folder)
    alike, alike_fresh = class_neighbours(known, model), class_neighbours(fresh, model)
    asked = questions(scale, fresh, alike_fresh)
    probe = Probe(asked[max(scale.asked), "random"][:32], knocked=0)
    done = Run(out)
    kept = {(row["strategy"], row["negatives"], row["seed"]) for row in done_rows(out)}
    wanted = [("none", "none", 0), *((s, n, seed) for seed in range(seeds) for s in strategies for n in NEGATIVES)]
    for strategy, negatives, seed in wanted:
        if (strategy, negatives, seed) in kept:
            continue
        at: Path | str = folder
        if strategy != "none":
            options: dict[str, Any] = {"general": Naming(known)} if strategy == "mix" else {}
            run = adapt(
                folder, out / f"{strategy} {negatives} {seed}", strategy=strategy, pool=known, shots=scale.shots, prompt=SHORT, lora=False,
                neighbours=alike if negatives == "hard" else None, projector=True, steps=scale.steps, lr=scale.lr, batch=scale.batch, probe=probe,
                measure_at=6, checkpoint_every=25, seed=seed, device="cpu", threads=threads, resume=True, **options,
            )  # fmt: skip
            at = run.result
        rows = ask(at, asked, strategy=strategy, negatives=negatives, seed=seed)
        done.log({"step": len(kept), "rows": rows})  # one line: a cell is there whole or not at all
        kept.add((strategy, negatives, seed))
    return pd.DataFrame(done_rows(out))


def done_rows(out: Path) -> list[dict[str, Any]]:
    """Rows of finished cells."""
    return [row for line in Run(out).lines() for row in line["rows"]]


def report(rows: pd.DataFrame) -> str:
    """Strategies by shots, and hard against random negatives in training, paired by strategy and seed."""
    text = []
    for asked in NEGATIVES:
        here = rows[rows["asked_negatives"] == asked]
        lines = []
        for (strategy, negatives), group in here.groupby(["strategy", "negatives"], sort=False):
            line = [str(strategy), str(negatives), str(group["seed"].nunique())]
            for _, at in group.groupby("shots"):
                many = runs_estimate(at["accuracy"].to_numpy(), unit="probability")
                low, high = (many.low, many.high) if len(at) > 1 else (at["low"].iloc[0], at["high"].iloc[0])
                line.append(f"{many.value:.3f} [{low:.3f}, {high:.3f}]")
            lines.append(line)
        header = ["strategy", "negatives in training", "seeds", *(f"{s} shots" for s in sorted(here["shots"].unique()))]
        text.append(f"Asked against {asked} negatives, n = {int(here['n'].iloc[0])} each\n\n{table(header, lines)}")
        text.append(worth(here))
    return "\n\n".join(text)


def worth(rows: pd.DataFrame) -> str:
    """Accuracy with hard minus with random negatives in training, with examples. Paired by strategy and seed; the interval is over seeds, which alone are independent."""
    wide = rows[rows["shots"] > 0].pivot_table(index=["strategy", "seed"], columns="negatives", values="accuracy")
    if not {"hard", "random"} <= set(wide.columns) or not len(wide[["hard", "random"]].dropna()):
        return "Hard against random negatives: no pair of trainings is finished."
    pairs = wide[["hard", "random"]].dropna()
    by_seed = (pairs["hard"] - pairs["random"]).groupby("seed").mean().to_numpy()
    found = runs_estimate(by_seed, unit="difference")
    said = f"[{found.low:+.3f}, {found.high:+.3f}]" if len(by_seed) > 1 else "(one seed: no interval)"
    return f"Hard minus random negatives, mean over {len(pairs)} pairs of trainings: {found.value:+.3f} {said}"


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scale", choices=sorted(SCALES), default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--base", help='fine-tune this model instead, e.g. "demo", which has met new names: another question')
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="sizes, e.g. steps=200 naming=300")
    given = parser.parse_args()
    changes = {name: type(getattr(SCALES[given.scale], name))(value) for name, value in (word.split("=") for word in given.set)}
    scale = replace(SCALES[given.scale], **changes)
    given.out.mkdir(parents=True, exist_ok=True)
    sizes, wanted = given.out / "scale.json", json.dumps(asdict(scale) | {"base": given.base or "no new names"})
    if sizes.exists() and sizes.read_text() != wanted:
        raise SystemExit(f"{given.out} holds another experiment: {sizes.read_text()}. Choose another folder.")
    sizes.write_text(wanted)
    rows = cells(given.out, scale, given.seeds, given.strategies, given.threads, given.base)
    rows.to_csv(given.out / "rows.csv", index=False)
    text = f"{machine()}; {wanted}\n\n{report(rows)}\n"
    (given.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
