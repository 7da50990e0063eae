"""Folders that appear whole or not at all, and files that must lie in theirs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mechicl.errors import OutputPathError


@contextmanager
def fresh_folder(folder: str | Path) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into; renamed to it at the end, removed after an error.

    Raises:
        OutputPathError: the folder holds something, or cannot be written.
    """
    target = Path(folder).expanduser()
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise OutputPathError(f"folder must be new or empty; {target} is not. Choose another, or remove it.")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            target.rmdir()
        os.replace(temporary, target)
    except OSError as error:
        raise OutputPathError(f"folder must be writable; {target} is not ({error.strerror or error}). Choose another.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def within(home: Path, name: str) -> Path | None:
    """The file `name` of a folder; None where the name leads out of it, by itself or by a link."""
    given = Path(name)
    if "\0" in name or "\\" in name or given.is_absolute() or ".." in given.parts:
        return None
    try:
        path, root = (home / given).resolve(), home.resolve()
    except (OSError, RuntimeError):  # a ring of links
        return None
    return path if path.is_relative_to(root) else None
