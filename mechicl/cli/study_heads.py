"""`mechicl study heads-at-odds`: induction heads against function-vector heads, on any model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechicl.cli.options import Classes, Quiet, Seed, Source, check_folder, one_of, write_text
from mechicl.errors import OptionError

WAYS = ("mean", "zero", "resample")

Tasks = Annotated[str, typer.Option(help='Separated by commas: concepts, digits, words (the answer is in the prompt), "known words", operator (it is not).', rich_help_panel="Episodes")]  # fmt: skip
Episodes = Annotated[
    int, typer.Option("--episodes", "-n", min=2, help="Prompts of each half, in each setting.", rich_help_panel="Episodes")
]
Functions = Annotated[
    int, typer.Option(min=1, help="Functions of a task that these are shared among, in each half.", rich_help_panel="Episodes")
]


def heads_at_odds(
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for what is finished, tables and an HTML page; the same command goes on where it was.")],
    source: Source = Source(),
    tasks: Tasks = "concepts,digits,words",
    shots: Annotated[str, typer.Option(help="Examples of each class, separated by commas.", rich_help_panel="Episodes")] = "1,2,4",
    episodes: Episodes = 24,
    functions: Functions = 4,
    classes: Classes = 4,
    size: Annotated[int, typer.Option(min=8, help="Side of the pictures, pixels.", rich_help_panel="Episodes")] = 28,
    seed: Seed = 0,
    doses: Annotated[str, typer.Option(help="Per cents of all heads that go off, separated by commas.")] = "1,2,4,8,16,25",
    how: Annotated[str, typer.Option(help="Ways of switching off, separated by commas; the verdict is about the first: mean, zero, resample.")] = "mean,zero",
    exclude: Annotated[float | None, typer.Option(help="Per cent of the other ranking's top that is left in; by default as many heads as go off (Yin and Steinhardt: 2).")] = None,
    random: Annotated[int, typer.Option(min=0, help="Matched random sets of each set at the main dose.")] = 20,
    band: Annotated[int, typer.Option(min=0, help="The same at the other doses.")] = 5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")] = 16,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Which heads carry in-context learning: those that copy labels, or those that say the task? Both switched off, each with the other left in."""
    folder = check_folder(out)
    assert folder is not None
    ways = _words("how", how)
    for way in ways:
        one_of("how", way, WAYS)
    asked: dict[str, Any] = {
        "tasks": _words("tasks", tasks), "shots": [int(x) for x in _numbers("shots", shots)], "n": episodes, "functions": functions, "classes": classes, "size": size,
        "doses": _numbers("doses", doses), "hows": ways, "n_random": random, "n_band": band, "seed": seed, "batch_size": batch_size,
    }  # fmt: skip
    from mechicl.studies.heads_at_odds import check, cost, run

    check(**{key: asked[key] for key in asked if key not in ("size", "seed", "batch_size")}, exclude=exclude)
    loaded = source.load(quiet)
    if dry_run or not quiet:
        typer.echo(str(cost(loaded, **asked)), err=True)
    if dry_run:
        return
    result = run(loaded, **asked, exclude=exclude, out=folder, progress=not quiet)
    _list(result)
    command = f'mechicl study heads-at-odds --model {source.model} --tasks "{tasks}" --shots {shots} --episodes {episodes} --functions {functions} --classes {classes} --size {size}'
    command += f" --seed {seed} --doses {doses} --how {how} --random {random} --band {band}" + (
        "" if exclude is None else f" --exclude {exclude:g}"
    )
    _write(folder, result, f"{command} --out {folder.name}")


def _words(name: str, text: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise OptionError(f"{name} must be at least one word, separated by commas; got {text!r}. See --help for the words.")
    return found


def _numbers(name: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or any(x <= 0 for x in found) or (name == "shots" and any(x != int(x) for x in found)):
        raise OptionError(f"{name} must be numbers above zero, separated by commas; got {text!r}. E.g. --{name} 1,2,4.")
    return found


def _list(result: Any) -> None:
    """Settings, the rows of all settings together, the verdict."""
    for s in result.settings:
        told = (
            f"intact {_cell(s.accuracy)}  zero-shot {_cell(s.zero_shot)}"
            if s.accuracy is not None
            else f"{_cell(s.found)}: not above chance, left out"
        )
        typer.echo(f"{s.task}, {s.shots} shots{'' if s.copied else ' (answer not in the prompt)'}: {told}  chance {s.chance:.2f}")
    typer.echo(f"\n{'all settings together, heads off':<58} {'k':>3}  {'how':<9} {'change':<24} {'p':>8} {'random':>7} {'p':>6}")
    for r in result.rows:
        if r.task == "all":
            change = f"{r.change.value:+.3f} [{r.change.low:+.3f}, {r.change.high:+.3f}]"
            typer.echo(
                f"{r.name:<58} {r.k:>3}  {r.how:<9} {change:<24} {r.p_corrected:>8.2g} {r.random_change:>+7.2f} {r.p_random:>6.3f}  {r.finding}"
            )
    for dose, o in result.overlaps.items():
        typer.echo(
            f"top {o.k} ({dose:g} %): {len(o.shared)} shared, {o.expected:.1f} by chance, p = {o.p:.2g}; rank correlation {o.spearman:+.2f}"
        )
    typer.echo(f"\n{result.verdict}")
    for note in result.notes:
        typer.echo(note, err=True)


def _cell(e: Any) -> str:
    return f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"


def _write(folder: Path, result: Any, command: str) -> None:
    """odds.html with the figure and every number."""
    from mechicl.views.heads_at_odds import about_odds
    from mechicl.views.page import PageContent, block, write_page
    from mechicl.views.plots import plot

    write_text(folder / "verdict.txt", f"{result.verdict}\n\n{result.rule}\n")
    blocks = (block("odds", "", plot(result), about_odds(result), result.to_frame(), raw=result.heads_frame()),)
    content = PageContent(f"Induction or function-vector heads in {result.provenance.model}", (result.verdict, result.rule), blocks, result.provenance, command, result.notes)  # fmt: skip
    typer.echo(f"Written to {write_page(folder / 'odds.html', content)}.", err=True)
