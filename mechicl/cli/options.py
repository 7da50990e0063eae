"""Options that several commands have, and what they do with them: draw episodes, load the model, write a file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mechicl.errors import OptionError, OutputPathError

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


def draw_episodes(
    task: str, n: int, classes: int, shots: int, size: int, seed: int, *, least: int = 1, one_length: bool = False
) -> list[Any]:
    """Episodes of the task. `one_length`: names of two syllables only, so that any label can take another's place (concepts; digits have the names they have)."""
    if n < least:
        raise OptionError(f"episodes must be at least {least}, half to find heads and half to prove them; got {n}. Ask for more.")
    from mechicl.data import concepts, digits

    if task == "concepts":
        return concepts.draw(n, classes=classes, shots=shots, size=size, seed=seed, syllables=(2, 2) if one_length else (1, 4))
    return digits.draw(n, classes=classes, shots=shots, size=size, seed=seed)


def task_name(task: str, classes: int, shots: int) -> str:
    return f"{task}, {classes} classes × {shots} {'shot' if shots == 1 else 'shots'}"


def load_model(name: str, device: str | None, dtype: str, revision: str | None, trust: bool, quiet: bool, *, check: bool = True) -> Any:
    import mechicl

    if not quiet:
        typer.echo(f"Loading {name} ...", err=True)
    return mechicl.load(name, device=device, dtype=dtype, revision=revision, trust_remote_code=trust, check=check)


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Refuses what is not among the allowed words."""
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(allowed)}; got {value!r}. Pick one of them.")


def check_folder(out: Path | None) -> Path | None:
    """A folder that files can be written to, or that can be made; nothing is made yet.

    Raises:
        OutputPathError: it is a file, its parent is missing, or one of them is read-only.
    """
    import os

    if out is None:
        return None
    folder = out.expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputPathError(f"out must be a folder; got the file {folder}. Name a folder.")
    if not folder.exists() and not folder.parent.is_dir():
        raise OutputPathError(f"out must lie in an existing folder; there is no folder {folder.parent}. Create it, or write elsewhere.")
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise OutputPathError(f"out must be writable; {folder} is not. Change its permissions, or write elsewhere.")
    return folder


def write_text(target: Path, text: str) -> None:
    """Written under a temporary name, then renamed."""
    import os
    import tempfile

    handle, temporary = tempfile.mkstemp(prefix=".mechicl-", dir=target.parent)
    with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, target)
