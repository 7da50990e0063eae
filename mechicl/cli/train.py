"""`mechicl train`: small models that learn from their prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechicl.cli.options import Device, Quiet
from mechicl.errors import OptionError


def train_vlm(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")],
    family: Annotated[str, typer.Option(help="qwen2_5_vl, qwen3_vl, llava, internvl, gemma3, smolvlm, ...")] = "qwen2_5_vl",
    preset: Annotated[str, typer.Option(help="demo, or micro for a quick try.")] = "demo",
    seed: Annotated[int, typer.Option(min=0, help="Decides weights, data and everything drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a small vision-language model of transformers' own class to learn from the examples in its prompt."""
    from mechicl.training.vlm import train

    folder = train(family, preset=preset, out=out, seed=seed, resume=resume, progress=not quiet)
    typer.echo(str(folder))


def train_toy(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder.")] = None,
    preset: Annotated[
        str,
        typer.Option(help="cpu, cpu_multimodal (ours, minutes); huang2026, huang2026_multimodal, reddy2024 (the papers', hours); modern."),
    ] = "cpu",
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, e.g. K=1024, positions=alibi, lr=3e-4; may be repeated.")
    ] = None,
    stop: Annotated[str | None, typer.Option(help='Stop early, e.g. "accuracy_ic>=0.95".')] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides weights, data and everything drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; 1 gives the same bits every time.")] = 1,
    device: Device = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Through torch.compile; needs a C++ compiler on a CPU.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train a toy transformer on sequences of vectors and watch in-context learning grow."""
    from mechicl.training.toys.recipe import from_words

    chosen = from_words(preset, changes or (), seed=seed, stop=stop)
    if dry_run:
        import json

        typer.echo(json.dumps(chosen.to_json(), indent=1))
        return
    if out is None:
        raise OptionError("out must be given; got none. Add --out FOLDER, or --dry-run to see the recipe.")
    from mechicl.training.toys.train import train_toy as train

    run = train(chosen, out, resume=resume, progress=not quiet, threads=threads, device=device, compile=compiled)
    last = run.table.iloc[-1]
    for name in ("loss", "accuracy", "accuracy_ic", "accuracy_ic2", "accuracy_iw", "cla_ic"):
        typer.echo(f"{name:<13} {last[name]:.3f}")
    typer.echo(f"Step {int(last['step'])}; {out}", err=True)
