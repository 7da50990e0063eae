"""Options that several commands have, and what they do with them: draw episodes, load the model, write a file."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mechicl.data import tasks
from mechicl.errors import OptionError, OutputPathError

How = Literal["zero", "mean", "resample"]

Model = Annotated[str, typer.Option("--model", "-m", help='"demo" (the bundled model), a folder, or a hub id.', rich_help_panel="Model")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ...", rich_help_panel="Model")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel="Model")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel="Model")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own Python code from the hub.", rich_help_panel="Model")]


def _known(name: str) -> str:
    """A task that there is; asked before anything else is looked at."""
    return tasks.named(name).name


TaskName = Annotated[
    str, typer.Option("--task", "-t", metavar="TASK", callback=_known, help=f"{tasks.described()}.", rich_help_panel="Episodes")
]
DataSource = Annotated[str | None, typer.Option("--data", help="own: a folder of class/picture.jpg, or a table (.csv, .jsonl, .parquet) of pictures and labels. VL-ICL Bench tasks: the benchmark's folder.", rich_help_panel="Episodes")]  # fmt: skip
Episodes = Annotated[int, typer.Option("--episodes", "-n", min=1, help="How many prompts.", rich_help_panel="Episodes")]
Classes = Annotated[int, typer.Option(min=2, help="Classes in each prompt.", rich_help_panel="Episodes")]
Shots = Annotated[int, typer.Option(min=1, help="Examples of each class.", rich_help_panel="Episodes")]
Size = Annotated[int, typer.Option(min=8, help="Side of the pictures, pixels; the README's numbers are at 28.", rich_help_panel="Episodes")]
AnyClasses = Annotated[int | None, typer.Option("--classes", min=2, help="Classes in each prompt; by default 4 where they are drawn here, 2 in own data and open_mi.", rich_help_panel="Episodes")]  # fmt: skip
AnySize = Annotated[int | None, typer.Option("--size", min=8, help="Side of the pictures, pixels; by default 56 where they are drawn here (the README's numbers are at 28). Files are shrunk to it, or left as they are.", rich_help_panel="Episodes")]  # fmt: skip
Seed = Annotated[int, typer.Option(min=0, help="Decides episodes, nulls, random heads.", rich_help_panel="Episodes")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per forward pass.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Off = Annotated[
    How,
    typer.Option(
        "--how",
        help="How heads are switched off: zero (the paper's, and the default in Python), mean over the prompts, or another prompt's (resample).",
    ),
]


@dataclass(frozen=True)
class Asked:
    """The prompts that a command was asked for. `classes` is None where the task decides it, `size` where pictures are left as they are."""

    task: str
    data: str | None
    n: int
    classes: int | None
    shots: int
    size: int | None
    seed: int

    @property
    def name(self) -> str:
        """In words, for results."""
        if self.classes is not None:
            return task_name(self.task if self.data is None else f"{self.task} of {Path(self.data).name}", self.classes, self.shots)
        return f"{self.task}, {self.shots} {'shot' if self.shots == 1 else 'shots'}"

    @property
    def flags(self) -> str:
        """As options, for the command that a report prints."""
        given = [("task", self.task), ("data", self.data and shlex.quote(self.data)), ("episodes", self.n), ("classes", self.classes), ("shots", self.shots), ("size", self.size), ("seed", self.seed)]  # fmt: skip
        return " ".join(f"--{name} {value}" for name, value in given if value is not None)

    def draw(self, *, least: int = 1, times: int = 1, one_length: bool = False) -> list[Any]:
        """`times` as many episodes as were asked for; with `one_length`, of a task that offers it, any label can take another's place.

        Raises:
            OptionError: fewer than `least`, or more than the data has.
            ImageError: data that cannot be used; what can be left out is left out and said.
        """
        if self.n < least:
            raise OptionError(f"episodes must be at least {least}, half to find heads and half to prove them; got {self.n}. Ask for more.")
        return tasks.named(self.task).episodes(
            times * self.n, classes=self.classes, shots=self.shots, size=self.size, seed=self.seed, data=self.data, one_length=one_length,
            tell=partial(typer.echo, err=True),
        )  # fmt: skip


def asked(
    task: str, data: str | None, n: int, classes: int | None, shots: int, size: int | None, seed: int, *, by_label: bool = True
) -> Asked:
    """What a command's options ask for, with defaults that suit the task; nothing is read yet. `by_label`: it tells examples with the right label from others.

    Raises:
        OptionError: data without a task that reads it, such a task without data, or a task whose answers no head score can use.
    """
    kind = tasks.named(task)
    if (data is not None) != kind.reads:
        raise OptionError(f"data must be given with the tasks that read it, and with no other; got task {task} {'with' if data else 'without'} --data. E.g. --task own --data photos.")  # fmt: skip
    if data is not None and not Path(data).expanduser().exists():
        raise OptionError(f"data must be a folder or a file; there is no {data!r}. Check the path.")
    if by_label and not kind.by_label:
        raise OptionError(
            f"task must be one whose answers occur among its examples; got {task}, where none does. Its written answers: mechicl eval tasks."
        )
    if classes is not None and "classes" not in kind.takes:
        raise OptionError(f"classes must be left out for {task}; got {classes}. Its answers are what occurs in the data.")
    if size is not None and "size" not in kind.takes:
        raise OptionError(f"size must be left out for {task}; got {size}. Its pictures have a size of their own.")
    classes, size = classes or kind.classes, size or kind.size
    return Asked(task, data, n, classes if "classes" in kind.takes else None, shots, size if "size" in kind.takes else None, seed)


def task_name(task: str, classes: int, shots: int) -> str:
    return f"{task}, {classes} classes × {shots} {'shot' if shots == 1 else 'shots'}"


def load_model(name: str, device: str | None, dtype: str, revision: str | None, trust: bool, quiet: bool, *, check: bool = True) -> Any:
    import mechicl

    if not quiet:
        typer.echo(f"Loading {name} ...", err=True)
    return mechicl.load(name, device=device, dtype=dtype, revision=revision, trust_remote_code=trust, check=check, progress=not quiet)


@dataclass(frozen=True)
class Source:
    """The options that name a model and say how it is loaded."""

    model: Model = "demo"
    device: Device = None
    dtype: Dtype = "auto"
    revision: Revision = None
    trust_remote_code: Trust = False

    def load(self, quiet: bool, *, check: bool = True) -> Any:
        """The model; see `mechicl.load`."""
        return load_model(self.model, self.device, self.dtype, self.revision, self.trust_remote_code, quiet, check=check)


@dataclass(frozen=True)
class Prompts:
    """The options that say which episodes are drawn, and how many."""

    task: TaskName = "concepts"
    data: DataSource = None
    episodes: Episodes = 64
    classes: AnyClasses = None
    shots: Shots = 2
    size: AnySize = None
    seed: Seed = 0

    def asked(self, *, by_label: bool = True) -> Asked:
        """Checked, with defaults that suit the task; see `asked`."""
        return asked(self.task, self.data, self.episodes, self.classes, self.shots, self.size, self.seed, by_label=by_label)


def one_of(name: str, value: str, allowed: Collection[str]) -> None:
    """Refuses what is not among the allowed words."""
    if value not in allowed:
        raise OptionError(f"{name} must be one of {', '.join(allowed)}; got {value!r}. Pick one of them.")


def check_folder(out: Path | None) -> Path | None:
    """A folder that files can be written to, or that can be made; it is not made yet, but what it lies in is (`--out runs/first` in a new folder).

    Raises:
        OutputPathError: it is a file, an absolute path's parent is missing (a drive that is not there?), or one of them is read-only.
    """
    import os

    if out is None:
        return None
    folder = out.expanduser()
    if folder.exists() and not folder.is_dir():
        raise OutputPathError(f"out must be a folder; got the file {folder}. Name a folder.")
    if not folder.exists() and not folder.parent.is_dir():
        if folder.is_absolute():
            raise OutputPathError(f"out must lie in an existing folder; there is no folder {folder.parent}. Create it, or write elsewhere.")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputPathError(
                f"out must lie in a folder that can be made; {folder.parent} cannot ({error.strerror}). Write elsewhere."
            ) from error
    if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
        raise OutputPathError(f"out must be writable; {folder} is not. Change its permissions, or write elsewhere.")
    return folder


def write_text(target: Path, text: str) -> None:
    """Written under a temporary name, then renamed. Errors: see `write_whole`."""
    from mechicl.data.folders import write_whole

    write_whole(target, text.encode())
