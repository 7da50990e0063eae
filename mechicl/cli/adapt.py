"""`mechicl adapt`: fine-tune a vision-language model on link-context episodes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechicl.cli.options import Device, Model, Quiet, check_folder, one_of
from mechicl.errors import OptionError

DATA, TRAIN, LOOK = "Episodes", "Training", "Measures"


def adapt(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")],
    model: Model = "demo",
    strategy: Annotated[str, typer.Option(help="2-way, 2-way-random, 2-way-weight, mix, or a name of the released code.", rich_help_panel=DATA)] = "2-way",
    pool: Annotated[str, typer.Option(help="generated, or a folder of classes (class/picture.jpg).", rich_help_panel=DATA)] = "generated",
    held_out: Annotated[Path | None, typer.Option(help="List of class folders that are kept for the probe.", rich_help_panel=DATA)] = None,
    shots: Annotated[int, typer.Option(min=1, help="Pictures of each class, or the most of them.", rich_help_panel=DATA)] = 16,
    size: Annotated[int, typer.Option(min=8, help="Longest side of the pictures, pixels.", rich_help_panel=DATA)] = 56,
    groups: Annotated[int, typer.Option(min=2, help="Pairs of classes of the generated pool.", rich_help_panel=DATA)] = 20,
    negatives: Annotated[str, typer.Option(help="hard: classes that look and sound alike; random: the control.", rich_help_panel=DATA)] = "hard",
    general: Annotated[str | None, typer.Option(help="Another task in the mix: concepts or digits.", rich_help_panel=DATA)] = None,
    mix: Annotated[float | None, typer.Option(min=0, max=1, help="Share of --general; one half with --strategy mix.", rich_help_panel=DATA)] = None,
    plain: Annotated[bool, typer.Option("--short", help="Ask in the bundled model's words instead of the published ones.", rich_help_panel=DATA)] = False,
    steps: Annotated[int, typer.Option(min=1, help="Updates.", rich_help_panel=TRAIN)] = 1000,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate; 1e-4 with LoRA, 1e-5 without.", rich_help_panel=TRAIN)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Episodes at once.", rich_help_panel=TRAIN)] = 4,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches of an update.", rich_help_panel=TRAIN)] = 1,
    full: Annotated[bool, typer.Option("--full", help="All weights of the decoder instead of LoRA.", rich_help_panel=TRAIN)] = False,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.", rich_help_panel=TRAIN)] = 16,
    dropout: Annotated[float, typer.Option(min=0, help="Of the adapters.", rich_help_panel=TRAIN)] = 0.0,
    projector: Annotated[bool, typer.Option("--projector", help="Train the projector too.", rich_help_panel=TRAIN)] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Arithmetic in bfloat16.", rich_help_panel=TRAIN)] = False,
    save_memory: Annotated[bool, typer.Option("--save-memory", help="Compute activations again in the backward pass.", rich_help_panel=TRAIN)] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps that a kill may cost.", rich_help_panel=TRAIN)] = 100,
    merged: Annotated[bool, typer.Option("--merged", help="With LoRA, write the whole model too.", rich_help_panel=TRAIN)] = False,
    probe: Annotated[int, typer.Option(min=0, help="Held-out episodes to measure on; 0: do not measure.", rich_help_panel=LOOK)] = 32,
    probe_shots: Annotated[int, typer.Option(min=1, help="Pictures of each class in them.", rich_help_panel=LOOK)] = 4,
    measure: Annotated[int, typer.Option(min=2, help="How often, start and end included.", rich_help_panel=LOOK)] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Decides weights, data and everything drawn.")] = 0,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; 1 gives the same bits every time.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Fine-tune the decoder on link-context episodes: a new name for a class, beside one that is hard to tell from it."""
    folder = check_folder(out)
    if negatives not in ("hard", "random"):
        raise OptionError(f"negatives must be hard or random; got {negatives!r}. random is the control.")
    if general not in (None, "concepts", "digits"):
        raise OptionError(f"general must be concepts or digits; got {general!r}. Leave it out for link-context episodes alone.")
    from mechicl.data.link_context import PUBLISHED, SHORT, STRATEGIES, check_pool, link_episodes
    from mechicl.training.runs import check_out

    one_of("strategy", strategy, STRATEGIES)  # all this before a model is loaded and its neighbours are looked for
    check_out(folder or out, resume=resume)
    if strategy == "mix" and general is None:
        general = "concepts"
    train, other = pools(pool, held_out, groups, size, seed)
    check_pool(train, strategy, shots)
    from mechicl.training.adapting.adapt import adapt as run

    words = SHORT if plain else PUBLISHED
    watched = link_episodes(other, probe, shots=probe_shots, prompt=words, seed=seed + 1) if probe and other is not None else None
    if probe and other is None:
        typer.echo("No classes are held out, so nothing is measured. Name some with --held-out.", err=True)
    alike: Any = None
    if negatives == "hard":
        from mechicl.analysis.link.neighbours import class_neighbours
        from mechicl.models.load import load

        alike = class_neighbours(train, load(model, device=device), per_class=16, seed=seed, progress=not quiet)
    done = run(
        model, out, strategy=strategy, pool=train, shots=shots, neighbours=alike, prompt=words, general=task(general, size), mix=mix, steps=steps, lr=lr,
        batch=batch, accumulation=accumulation, lora=not full, rank=rank, dropout=dropout, projector=projector, bf16=bf16, save_memory=save_memory,
        probe=watched, measure_at=measure, checkpoint_every=checkpoint_every, merged=True if merged else None, seed=seed, device=device, threads=threads,
        resume=resume, progress=not quiet,
    )  # fmt: skip
    if done.growth is not None:
        first, last = f"step {done.growth.steps[0]}", f"step {done.growth.steps[-1]}"
        typer.echo(f"{'':<44}{first:>10}{last:>10}")
        for name, values in done.growth.values.items():
            typer.echo(f"{name:<44}{values[0]:>10.3f}{values[-1]:>10.3f}")
    typer.echo(str(done.result))


def pools(name: str, held_out: Path | None, groups: int, size: int, seed: int) -> tuple[Any, Any]:
    """Classes to train on, and others to measure on (None where none are held out)."""
    if name == "generated":
        from mechicl.data.link_context import generated_pool

        return generated_pool(seed, groups, size=size, split="train"), generated_pool(seed, min(groups, 10), size=size, split="held_out")
    from mechicl.data.class_folders import load_class_folders

    found = load_class_folders(name, held_out=held_out, size=size)
    return found.train, found.held_out


class Task:
    """Episodes of a task that mechicl brings along, as a source."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.about = {"task": name, "size": size}

    def __call__(self, n: int, seed: int) -> list[Any]:
        """n episodes of four classes with two examples each."""
        from mechicl.data import concepts, digits

        if self.name == "digits":
            return digits.draw(n, classes=4, shots=2, size=self.size, seed=seed)
        return concepts.draw(n, classes=4, shots=2, size=self.size, seed=seed, split="train")


def task(name: str | None, size: int) -> Task | None:
    """A task by name."""
    return None if name is None else Task(name, size)
