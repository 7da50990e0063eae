"""Options of commands whose episodes several workers can share, and the crew (or the one model) that they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from mechicl.cli.options import Source
from mechicl.errors import OptionError

Workers = Annotated[
    int,
    typer.Option(
        min=0, help="Share the episodes between so many processes (Ray), each with the model; 0: this one.", rich_help_panel="Workers"
    ),
]
RayAddress = Annotated[str | None, typer.Option(help="A Ray cluster: auto, host:port, ray://host:port.", rich_help_panel="Workers")]
Kept = Annotated[Path | None, typer.Option(help="Keep workers' finished shards here, and go on from them.", rich_help_panel="Workers")]


@contextmanager
def model_or_crew(
    source: Source,
    quiet: bool,
    *,
    workers: int,
    address: str | None,
    kept: Path | None,
) -> Iterator[Any]:
    """The model, or a crew of workers that hold it.

    Raises:
        OptionError: an address or a folder for workers without workers.
    """
    if not workers:
        if address is not None or kept is not None:
            raise OptionError("ray-address and kept must come with --workers; got 0 workers. Say how many share the episodes.")
        yield source.load(quiet)
        return
    from mechicl.analysis.spread.job import hire

    if not quiet:
        typer.echo(f"Loading {source.model} in {workers} workers ...", err=True)
    with hire(
        source.model,
        workers=workers,
        address=address,
        out=kept,
        device=source.device,
        dtype=source.dtype,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
    ) as crew:
        yield crew
