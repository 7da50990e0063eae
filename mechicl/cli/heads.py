"""`mechicl heads`, `ablate`, `doctor`: score heads, switch them off, and check the model they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechicl.cli.options import BatchSize, Off, Prompts, Quiet, Source, write_text
from mechicl.cli.workers import Kept, RayAddress, Workers, model_or_crew
from mechicl.errors import OptionError


def heads(
    source: Source = Source(),
    given: Prompts = Prompts(),
    top: Annotated[int, typer.Option(min=1, help="Heads to list per score.")] = 5,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write every score of every head as CSV.")] = None,
    batch_size: BatchSize = 8,
    workers: Workers = 0,
    ray_address: RayAddress = None,
    kept: Kept = None,
    quiet: Quiet = False,
) -> None:
    """Score every head, each score with its null, and list the best."""
    from mechicl.views.report import check_writable

    target = check_writable(out) if out is not None else None
    prompts = given.asked()
    few = prompts.draw()
    with model_or_crew(source, quiet, workers=workers, address=ray_address, kept=kept) as loaded:
        from mechicl.analysis.heads.scoring import score_heads

        scores = score_heads(loaded, few, seed=given.seed, batch_size=batch_size, task=prompts.name, progress=not quiet)
    typer.echo("score                   head     value  95 % interval     null   p (Holm)")
    for name, score in scores.scores.items():
        for layer, head in score.top(top):
            at = (layer, head)
            mark = " *" if score.p_corrected[at] < 0.05 else ""
            typer.echo(
                f"{name:<22}  {f'{layer}.{head}':<6} {score.value[at]:>7.3f}  {score.low[at]:>6.3f} to {score.high[at]:>6.3f}  {score.null[at]:>6.3f}   {score.p_corrected[at]:.2g}{mark}"
            )
    if target is not None:
        write_text(target, scores.to_frame().to_csv(index=False, lineterminator="\n"))
        typer.echo(f"Written to {target}.", err=True)
    for note in scores.notes:
        typer.echo(note, err=True)


def ablate(
    chosen: Annotated[str | None, typer.Option("--heads", help="Heads as layer.head, e.g. 1.3,1.4, counted from 0.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="The best heads by --by, ranked on other episodes.")] = None,
    by: Annotated[str, typer.Option(help="The score that ranks --top.")] = "induction",
    source: Source = Source(),
    given: Prompts = Prompts(),
    how: Off = "mean",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write every accuracy as CSV.")] = None,
    batch_size: BatchSize = 8,
    workers: Workers = 0,
    ray_address: RayAddress = None,
    kept: Kept = None,
    quiet: Quiet = False,
) -> None:
    """Switch heads off, beside as many random heads, and see what happens to the answers."""
    from mechicl.views.report import check_writable

    if (chosen is None) == (top is None):
        raise OptionError(
            f"heads must be given as --heads or as --top; got {'neither' if chosen is None else 'both'}. E.g. --heads 1.3,1.4 or --top 4 --by induction."
        )
    wanted = parse_heads(chosen) if chosen is not None else ()
    target = check_writable(out) if out is not None else None
    if top is not None:
        _check_score(by)
    prompts = given.asked(by_label=top is not None)
    few = prompts.draw(times=2 if top else 1)
    with model_or_crew(source, quiet, workers=workers, address=ray_address, kept=kept) as loaded:
        from mechicl.analysis.ablation.ablate import ablate as switch_off
        from mechicl.analysis.heads.scoring import score_heads
        from mechicl.views.story import against_random, percent, points
        from mechicl.views.tables import ablation_frame

        common: dict[str, Any] = {"seed": given.seed, "batch_size": batch_size, "task": prompts.name, "progress": not quiet}
        if top is not None:
            scores = score_heads(loaded, few[::2], scores=(by,), **common)
            wanted, few = tuple(scores.top(by, top)), few[1::2]
        result = switch_off(loaded, few, wanted, how=how, **common)
    typer.echo(f"intact               {percent(result.intact.accuracy)}, chance {100 * result.intact.chance:.0f} %, n = {result.n}")
    typer.echo(
        f"off: {' '.join(f'{a}.{b}' for a, b in wanted):<15} {percent(result.chosen.accuracy)}, {points(result.chosen.change)}, McNemar p = {result.chosen.mcnemar_p:.2g}"
    )
    for cell in result.singles if len(wanted) > 1 else ():
        typer.echo(f"only {f'{cell.heads[0][0]}.{cell.heads[0][1]}':<15} {percent(cell.accuracy)}, {points(cell.change)}")
    if result.random:
        typer.echo(against_random(result))
    typer.echo(result.verdict)
    if target is not None:
        write_text(target, ablation_frame(result).to_csv(index=False, lineterminator="\n"))
        typer.echo(f"Written to {target}.", err=True)


def doctor(
    source: Source = Source(),
) -> None:
    """Is this model, on this machine, in this dtype, safe to draw conclusions from? Exit code 1 if a check fails."""
    loaded = source.load(True, check=False)
    from mechicl.models.doctor import diagnose

    checks = diagnose(loaded)
    for check in checks:
        typer.echo(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.value:.3g} {check.unit} (limit {check.limit:.3g})")
        if not check.ok or check.value != check.value:
            typer.echo(f"      {check.advice}")
    failed = sum(not check.ok for check in checks)
    typer.echo(f"{len(checks) - failed} of {len(checks)} checks passed.", err=True)
    if failed:
        raise typer.Exit(1)


def parse_heads(text: str) -> tuple[tuple[int, int], ...]:
    """ "1.3,1.4" -> ((1, 3), (1, 4)).

    Raises:
        OptionError: not layer.head pairs, or the same head twice.
    """
    pairs = [part.strip() for part in text.split(",") if part.strip()]
    numbers = [part.split(".") for part in pairs]
    if not pairs or not all(len(n) == 2 and all(x.isascii() and x.isdigit() for x in n) for n in numbers):
        raise OptionError(f"heads must be layer.head pairs separated by commas, counted from 0; got {text!r}. E.g. --heads 1.3,1.4.")
    found = tuple((int(a), int(b)) for a, b in numbers)
    if len(set(found)) != len(found):
        raise OptionError(f"heads must differ; got {text!r}. Name each head once.")
    return found


def _check_score(name: str) -> None:
    from mechicl.analysis.heads.named import SCORES

    if name not in SCORES:
        raise OptionError(f"by must be one of {', '.join(SCORES)}; got {name!r}. Pick one of them.")
