"""`mechicl sweep`: toys over a grid of settings and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechicl.cli.options import Device, Quiet
from mechicl.errors import OptionError


def sweep(
    spec: Annotated[Path, typer.Argument(help="A TOML file of settings, grids and seeds; docs/sweeps.md has the format.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The sweep's folder; one that is there already is continued.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-w", min=1, help="Processes on this machine; by default one a core.")] = None,
    together: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many cells of the same shapes in one batched step; by default 4 on a CPU, 64 on a GPU."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each worker; by default the cores are shared out.")] = None,
    device: Device = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Keep every cell's checkpoints; a cell that was in flight goes on from its last one.")
    ] = False,
    ray_address: Annotated[str | None, typer.Option(help='A Ray cluster: "auto", host:port, or "local" to start one here.')] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained and about how long it takes, and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train toys over a grid of settings and seeds. Killed, it goes on where it was; exit code 1 if a cell failed."""
    if not spec.expanduser().is_file():
        raise OptionError(f"spec must be a TOML file; there is no file {spec}. Check the path; docs/sweeps.md has the format.")
    from mechicl.training.sweeps import sweep as sweeps

    workers = workers or sweeps.cores()
    if dry_run:
        from mechicl.training.sweeps.cost import outlook

        for line in outlook(spec, out, together=together, workers=workers, threads=threads, device=device):
            typer.echo(line)
        return
    if out is None:
        raise OptionError("out must be given; got none. Add --out FOLDER, or --dry-run to see what would be trained.")
    table = sweeps.run(
        spec,
        out,
        workers=workers,
        together=together,
        threads=threads,
        device=device,
        keep_models=keep_models,
        ray_address=ray_address,
        progress=not quiet,
    )
    failed = table.attrs["failed"]
    for reason in failed.values():
        typer.echo(f"No result: {reason}", err=True)
    typer.echo(str(out / "results.parquet") if len(table) else str(out))
    if failed:
        typer.echo(f"{len(failed)} cells have no result; {out / 'failed'} says why.", err=True)
        raise typer.Exit(1)
