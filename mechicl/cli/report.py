"""`mechicl report`: the whole story on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mechicl.cli.options import BatchSize, Off, Prompts, Quiet, Source


def report(
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")],
    source: Source = Source(),
    given: Prompts = Prompts(),
    how: Off = "mean",
    threshold: Annotated[float, typer.Option(min=0.0, max=0.99, help="Least score of a head that is switched off.")] = 0.1,
    trace: Annotated[
        bool, typer.Option("--trace/--no-trace", help="Also follow the answer through the layers and look for the circuit.")
    ] = True,
    kv: Annotated[bool, typer.Option("--kv/--no-kv", help="Also say what the examples change in the query's keys and values.")] = True,
    batch_size: BatchSize = 8,
    quiet: Quiet = False,
) -> None:
    """Find the heads, prove them, and write one HTML page that opens with no network."""
    from mechicl.views.report import ReportContent, check_writable, write_report

    target = check_writable(out)
    prompts = given.asked()
    few = prompts.draw(least=8)
    loaded = source.load(quiet)
    from mechicl.analysis.study import find_and_prove

    study = find_and_prove(
        loaded,
        few,
        how=how,
        threshold=threshold,
        seed=given.seed,
        batch_size=batch_size,
        task=prompts.name,
        growth=_growth(source.model),
        trace=trace,
        kv=kv,
        progress=not quiet,
    )
    command = f"mechicl report --model {source.model} {prompts.flags} --how {how}{'' if trace else ' --no-trace'}{'' if kv else ' --no-kv'} --out {out.name}"
    written = write_report(target, ReportContent(study, command=command))
    from mechicl.views.story import headline

    typer.echo(headline(study))
    typer.echo(f"Written to {written} ({written.stat().st_size / 1e6:.1f} MB).", err=True)


def _growth(name: str) -> Any:
    """The training curve that lies beside a model trained here; None for any other model."""
    from mechicl.errors import CheckpointError
    from mechicl.models.load import demo_folder
    from mechicl.training.growth import read_growth

    folder = demo_folder() if name == "demo" else Path(name).expanduser()
    for place in (folder, folder.parent):
        if (place / "growth.json").is_file():
            try:
                return read_growth(place)
            except CheckpointError as error:
                typer.echo(f"No growth plot: {error}", err=True)
    return None
