"""Options that several commands have, and what they do with them: draw episodes, load the model, write a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mechicl.errors import OptionError

Task = Literal["concepts", "digits"]
How = Literal["zero", "mean", "resample"]

Model = Annotated[str, typer.Option("--model", "-m", help='"demo" (the bundled model), a folder, or a hub id.', rich_help_panel="Model")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...", rich_help_panel="Model")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel="Model")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel="Model")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code from the hub.", rich_help_panel="Model")]
TaskName = Annotated[
    Task,
    typer.Option(
        "--task", "-t", help="concepts: pictures of concepts nobody has met; digits: real handwritten digits.", rich_help_panel="Episodes"
    ),
]
Episodes = Annotated[int, typer.Option("--episodes", "-n", min=1, help="How many prompts.", rich_help_panel="Episodes")]
Classes = Annotated[int, typer.Option(min=2, help="Classes in each prompt.", rich_help_panel="Episodes")]
Shots = Annotated[int, typer.Option(min=1, help="Examples of each class.", rich_help_panel="Episodes")]
Size = Annotated[int, typer.Option(min=8, help="Side of the pictures, pixels.", rich_help_panel="Episodes")]
Seed = Annotated[int, typer.Option(min=0, help="Decides episodes, nulls, random heads.", rich_help_panel="Episodes")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Off = Annotated[How, typer.Option("--how", help="How heads are switched off.")]


def draw_episodes(task: str, n: int, classes: int, shots: int, size: int, seed: int, *, least: int = 1) -> list[Any]:
    if n < least:
        raise OptionError(f"episodes must be at least {least}, half to find heads and half to prove them; got {n}. Ask for more.")
    from mechicl.data import concepts, digits

    return (concepts if task == "concepts" else digits).draw(n, classes=classes, shots=shots, size=size, seed=seed)


def task_name(task: str, classes: int, shots: int) -> str:
    return f"{task}, {classes} classes × {shots} {'shot' if shots == 1 else 'shots'}"


def load_model(name: str, device: str | None, dtype: str, revision: str | None, trust: bool, quiet: bool, *, check: bool = True) -> Any:
    import mechicl

    if not quiet:
        typer.echo(f"Loading {name} ...", err=True)
    return mechicl.load(name, device=device, dtype=dtype, revision=revision, trust_remote_code=trust, check=check)


def write_text(target: Path, text: str) -> None:
    """Written under a temporary name, then renamed."""
    import os
    import tempfile

    handle, temporary = tempfile.mkstemp(prefix=".mechicl-", dir=target.parent)
    with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, target)
