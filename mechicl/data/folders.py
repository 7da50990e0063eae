"""Folders and files that appear whole or not at all, folders that one process works in at a time, and files that must lie in theirs."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, ClassVar

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


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to the disk, rename: a reader never sees half of it.

    Raises:
        OutputPathError: the disk is full or the folder cannot be written; a file that was there stays as it was.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, for writers that want a name; flushed to the disk and renamed at the end, removed after an error.

    Raises:
        OutputPathError: the disk is full or the folder cannot be written; a file that was there stays as it was.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputPathError(
            f"{path.name} must be written to {path.parent}; that failed ({error.strerror or error}). What was there is untouched: make room and resume."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Append a line, whole and flushed to the disk.

    Raises:
        OutputPathError: the disk is full or the folder cannot be written; the lines before it stay, and a part of this one is taken back where that is possible.
    """
    try:
        with path.open("ab") as file:
            before = file.tell()
            try:
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(path, before)
                raise
    except OSError as error:
        raise OutputPathError(
            f"{path.name} must be written to {path.parent}; that failed ({error.strerror or error}). What is finished is kept: make room and resume."
        ) from error


class Hold:
    """A folder that this process works in, until `close`, the end of the object or the end of the process, however that ends.

    The lock is the system's own, on the file that says what the folder is for, so nothing is left behind. One process may hold a folder several times: a
    notebook goes on with what it began. Where the system has no such locks, nothing is held.

    Args:
        plan: A file that stays in the folder.
        what: What the folder holds, for the message.

    Raises:
        OutputPathError: another process is at work in the folder.
    """

    _files: ClassVar[dict[tuple[int, int], tuple[IO[bytes], int]]] = {}

    def __init__(self, plan: Path, what: str) -> None:
        try:
            import fcntl
        except ImportError:
            return
        try:
            file = plan.open("rb")
        except OSError as error:
            raise OutputPathError(
                f"{plan.name} must be readable; {plan} is not ({error.strerror or error}). Change its permissions."
            ) from error
        about = os.fstat(file.fileno())
        key = about.st_dev, about.st_ino
        if key in self._files:
            file.close()
            file, count = self._files[key]
        else:
            count = 0
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise OutputPathError(
                    f"out must be free; another {what} is at work in {plan.parent}. Wait for it, stop it, or choose another folder."
                ) from error
            except OSError:  # a file system without locks
                file.close()
                return
        self._files[key] = file, count + 1
        self._end = weakref.finalize(self, _let_go, self._files, key)

    def close(self) -> None:
        """Let others in."""
        if hasattr(self, "_end"):
            self._end()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _let_go(files: dict[tuple[int, int], tuple[IO[bytes], int]], key: tuple[int, int]) -> None:
    file, count = files.pop(key)
    if count > 1:
        files[key] = file, count - 1
    else:
        file.close()
