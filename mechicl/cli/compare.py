"""`mechicl compare` and `mechicl series`: two models side by side, one along its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mechicl.cli.options import (
    AnyClasses,
    AnySize,
    BatchSize,
    DataSource,
    Device,
    Dtype,
    Episodes,
    Quiet,
    Seed,
    Shots,
    TaskName,
    Trust,
    asked,
    check_folder,
    one_of,
    write_text,
)
from mechicl.errors import OptionError

How = Literal["auto", "index", "depth", "function"]
Modality = Literal["pictures", "words", "both"]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder: keeps what is measured, and at the end the tables and a figure.")]


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL_A MODEL_B", show_default=False, help='Each "demo", a folder, or a hub id; one twice for --modality both.'
        ),
    ] = None,
    named: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="The same as an argument; give it twice.", rich_help_panel="Model")
    ] = None,
    task: TaskName = "concepts",
    data: DataSource = None,
    modality: Annotated[
        Modality,
        typer.Option(help="What both are shown; both: pictures to the first, the same in words to the second.", rich_help_panel="Episodes"),
    ] = "pictures",
    episodes: Episodes = 64,
    classes: AnyClasses = None,
    shots: Shots = 2,
    size: AnySize = None,
    seed: Seed = 0,
    scores: Annotated[str | None, typer.Option(help="Head scores, separated by commas; the first one leads.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Heads at the top of each that are compared.")] = 10,
    align: Annotated[How, typer.Option(help="How heads are paired; auto looks at the weights.")] = "auto",
    improve: Annotated[str | None, typer.Option(help="Also test the claim that the second model's heads are better in this score.")] = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
) -> None:
    """Which head stands for which, do the same heads do the work, and how far do scores and answers differ?"""
    wanted = _scores(scores)
    if improve is not None:
        one_of("improve", improve, _known())
        wanted = wanted if wanted is None or improve in wanted else (*wanted, improve)
    folder = check_folder(out)
    model_a, model_b = _two([*(models or ()), *(named or ())])
    prompts = asked(task, data, episodes, classes, shots, size, seed)
    shown = prompts.draw()
    from mechicl.analysis.comparison.compare import COMPARED
    from mechicl.analysis.comparison.compare import compare as side_by_side
    from mechicl.analysis.comparison.words import in_words

    told = in_words(shown, seed=seed) if modality != "pictures" else shown
    chosen = wanted or (*COMPARED, *(() if improve is None or improve in COMPARED else (improve,)))
    result = side_by_side(
        model_a, model_b, told if modality == "words" else shown, episodes_b=told if modality == "both" else None, scores=chosen, top=top, align=align, seed=seed,
        batch_size=batch_size, task=prompts.name, out=folder, progress=not quiet,
        load_options={"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code},
    )  # fmt: skip
    typer.echo("score             top  shared  by chance        p   rank correlation")
    for one in result.scores.values():
        typer.echo(f"{one.name:<16} {one.k:>4} {len(one.shared):>7} {one.expected:>10.2f} {one.p:>8.2g}   {one.spearman}")
    typer.echo(f"Heads aligned {result.why}.")
    typer.echo(result.verdict)
    figures: dict[str, Any] = {"compare.html": result}
    if improve is not None:
        from mechicl.analysis.comparison.improve import heads_improve

        claim = heads_improve(result, score=improve, top=min(top, result[improve].k), seed=seed)
        typer.echo(claim.verdict)
        figures["improve.html"] = claim
    for note in result.notes:
        typer.echo(note, err=True)
    _write(folder, {"scores.csv": result.to_frame(), "pairs.csv": result.pairs_frame()}, figures)


def series(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A folder of checkpoints, or a hub id with --revisions.", rich_help_panel="Model")
    ] = None,
    revisions: Annotated[str | None, typer.Option(help="Of a hub model, separated by commas: step1000,step2000 or main=3000.")] = None,
    task: TaskName = "concepts",
    data: DataSource = None,
    modality: Annotated[
        Literal["pictures", "words"], typer.Option(help="What the model is shown.", rich_help_panel="Episodes")
    ] = "pictures",
    episodes: Episodes = 64,
    classes: AnyClasses = None,
    shots: Shots = 2,
    size: AnySize = None,
    seed: Seed = 0,
    scores: Annotated[str | None, typer.Option(help="Head scores, separated by commas.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Heads of the last checkpoint that are followed.")] = 4,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
) -> None:
    """Accuracy and heads along a training, on the same episodes at every checkpoint; asked again with the same --out, it goes on."""
    wanted = _scores(scores)
    named = _revisions(revisions)
    folder = check_folder(out)
    if model is None:
        raise OptionError("model must be given; got none. E.g. mechicl series runs/checkpoints, or --model.")
    prompts = asked(task, data, episodes, classes, shots, size, seed)
    shown = prompts.draw()
    from mechicl.analysis.comparison.checkpoints import series as follow
    from mechicl.analysis.comparison.words import in_words
    from mechicl.analysis.trainings.growth import GROWN

    result = follow(
        model, in_words(shown, seed=seed) if modality == "words" else shown, revisions=named, scores=wanted or GROWN, top=top, seed=seed, batch_size=batch_size,
        task=prompts.name, out=folder, progress=not quiet, load_options={"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code},
    )  # fmt: skip
    table = result.series
    typer.echo("measure" + " " * 35 + "".join(f"{step:>9}" for step in table.steps))
    for name, values in table.values.items():
        typer.echo(f"{name:<42}" + "".join(f"{value:>9.3f}" for value in values))
    for name, change in result.changes.items():
        if change is not None:
            typer.echo(f"{name}: {change[1]:.2f} to {change[2]:.2f} at step {change[0]:.0f}")
    for note in result.notes:
        typer.echo(note, err=True)
    _write(folder, {"series.csv": result.to_frame()}, {"series.html": result})


def _two(given: list[str]) -> tuple[str, str]:
    """Two models.

    Raises:
        OptionError: fewer or more, by name.
    """
    if len(given) != 2:
        raise OptionError(f"models must be two; got {', '.join(map(repr, given)) or 'none'}. E.g. mechicl compare demo runs/adapted/model.")
    return given[0], given[1]


def _known() -> list[str]:
    from mechicl.analysis.heads.named import SCORES

    return list(SCORES)


def _scores(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in found:
        one_of("scores", name, _known())
    if not found:
        raise OptionError(f"scores must be names separated by commas; got {text!r}. E.g. --scores induction,previous_token.")
    return found


def _revisions(text: str | None) -> dict[str, int] | list[str] | None:
    """ "step1000,step2000" as a list; "step1000,main=3000" as {name: step}.

    Raises:
        OptionError: a step is not a number.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not any("=" in part for part in parts):
        return parts
    from mechicl.analysis.comparison.places import step_of

    found: dict[str, int] = {}
    for part in parts:
        name, _, step = part.partition("=")
        number = int(step) if step.isdecimal() else step_of(name) if not step else None
        if number is None:
            raise OptionError(f"revisions must be names with their steps; got {part!r}. E.g. --revisions step1000,main=3000.")
        found[name] = number
    return found


def _write(folder: Path | None, tables: dict[str, Any], figures: dict[str, Any]) -> None:
    if folder is None:
        return
    from mechicl.views.plots import plot

    for name, table in tables.items():
        write_text(folder / name, table.to_csv(index=False, lineterminator="\n"))
    for name, result in figures.items():
        write_text(folder / name, plot(result).to_html(include_plotlyjs=True, div_id=name.removesuffix(".html")))
    typer.echo(f"Written to {folder}.", err=True)
