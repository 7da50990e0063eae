"""Pictures in a folder for each class, as ImageNet's are: FOLDER/class/picture.jpg, split into training and held-out classes by a list file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mechicl.data.folders import within
from mechicl.data.link_pool import LinkClass, Pool
from mechicl.data.memes_check import MAX_PIXELS, SHOWN, Problem, open_picture, problem_lines
from mechicl.errors import ImageError, OptionError

ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
"""Of names of pictures, in any case."""


@dataclass(frozen=True)
class FoldersReport:
    """What a folder holds, before anything is computed with it.

    Attributes:
        classes: For each class folder its name in words and its usable pictures, in order.
        held_out: Class folders that the list names, in the list's order; empty without a list.
        problems: What cannot be used. Kinds: "missing" (the list names a class that is not there), "broken", "escapes", "few", "stranger" (a file that is no
            picture by its name), "folder".
    """

    folder: str
    classes: dict[str, tuple[str, tuple[Path, ...]]]
    held_out: tuple[str, ...]
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        counts = [len(files) for _, files in self.classes.values()]
        many = f"{min(counts, default=0)} to {max(counts, default=0)}"
        train = len(self.classes) - len(self.held_out)
        lines = [
            f"{self.folder}: {len(self.classes)} classes ({train} for training, {len(self.held_out)} held out), {many} pictures each, {len(self.problems)} problems."
        ]
        twins = [name for name, n in Counter(name for name, _ in self.classes.values()).items() if n > 1]
        if twins:
            lines.append(f"- names of more than one class: {', '.join(twins[:SHOWN])}")
        return "\n".join([*lines, *problem_lines(self.problems)])


@dataclass(frozen=True, eq=False)
class ClassFolders:
    """A checked folder: `train` holds the classes that the list does not name, `held_out` those that it does, in its order (None without a list)."""

    report: FoldersReport
    train: Pool
    held_out: Pool | None


def load_class_folders(
    folder: str | Path,
    *,
    held_out: str | Path | Sequence[str] | None = None,
    names: str | Path | Mapping[str, str] | None = None,
    least: int = 2,
    most: int | None = None,
    size: int | None = None,
    strict: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> ClassFolders:
    """Folders of classes, split by a list.

    Args:
        folder: Holds a folder for each class.
        held_out: A file with one class folder a line (what follows a space is not read), or the folders' names.
        names: What classes are called: a mapping from folders, or a file of lines "folder name" or "folder number name" ("_" is read as a space).
            None: the folder's name.
        least: Fewest usable pictures of a class.
        most: No more pictures of a class are looked at, the first ones by name; None for all.
        size: Pictures are shrunk until no side is longer, pixels, when they are read.
        strict: Any problem is an error. Else what cannot be used is left out and stays in `report.problems`.
        max_pixels: Larger pictures are a problem.

    Raises:
        ImageError: with the whole report: no such folder, fewer than two usable classes on a side, or, with `strict`, any problem.
        OptionError: a file of names or of held-out classes that cannot be read, or numbers out of range.
    """
    report = check_class_folders(folder, held_out=held_out, names=names, least=least, most=most, max_pixels=max_pixels)
    train = [key for key in report.classes if key not in report.held_out]
    few = len(train) < 2 or (held_out is not None and len(report.held_out) < 2)
    if few or (strict and report.problems):
        raise ImageError(
            f"folder must hold class/picture.jpg, two classes of {least} readable pictures at least on each side of the split; got\n{report}\n"
            "Repair it, or pass strict=False to leave out what is unusable."
        )

    def pool(keys: Sequence[str]) -> Pool:
        classes = tuple(LinkClass(report.classes[key][0], report.classes[key][1], key=key) for key in keys)
        return Pool(classes, size, max_pixels, Path(folder).name)

    return ClassFolders(report, pool(train), pool(report.held_out) if held_out is not None else None)


def check_class_folders(
    folder: str | Path,
    *,
    held_out: str | Path | Sequence[str] | None = None,
    names: str | Path | Mapping[str, str] | None = None,
    least: int = 2,
    most: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> FoldersReport:
    """Look through a folder and unpack every picture, without keeping any. See `load_class_folders`."""
    if least < 1 or (most is not None and most < least):
        raise OptionError(f"least must be at least 1, and most no less; got {least} and {most}. Episodes of 16 shots need 17 pictures.")
    wanted, called = _held_out(held_out), _names(names)
    root, problems = Path(folder).expanduser(), list[Problem]()
    if not root.is_dir():
        return FoldersReport(str(folder), {}, (), (Problem("folder", str(folder), "there is no such folder"),))
    classes: dict[str, tuple[str, tuple[Path, ...]]] = {}
    for place in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = tuple(_files(root, place, most, max_pixels, problems))
        if len(files) < least:
            problems.append(Problem("few", place.name, f"{len(files)} usable pictures where at least {least} are needed"))
        else:
            classes[place.name] = (called.get(place.name) or place.name.replace("_", " ").strip(), files)
    problems += [Problem("missing", key, "the list names it, and there is no such usable class") for key in wanted if key not in classes]
    return FoldersReport(str(folder), classes, tuple(key for key in wanted if key in classes), tuple(problems))


def _files(root: Path, place: Path, most: int | None, max_pixels: int, problems: list[Problem]) -> list[Path]:
    found: list[Path] = []
    for file in sorted(path for path in place.iterdir() if not path.name.startswith(".")):
        where = f"{place.name}/{file.name}"
        if most is not None and len(found) == most:
            break
        if file.suffix.lower() not in ENDINGS or file.is_dir():
            problems.append(Problem("stranger", where, "no picture by its name"))
        elif within(root, where) is None:
            problems.append(Problem("escapes", where, "a link that leads out of the folder"))
        elif not file.is_file():
            problems.append(Problem("broken", where, "a link to nothing, or no file"))
        else:
            try:
                open_picture(file, max_pixels=max_pixels)
                found.append(file)
            except (ImageError, OSError) as error:
                problems.append(Problem("broken", where, f"cannot be used ({error})"))
    return found


def _held_out(given: str | Path | Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    keys = [line.split()[0] for line in _read(given, "held_out")] if isinstance(given, str | Path) else list(given)
    if not keys:
        raise OptionError("held_out must name classes; got none. Write one folder's name a line.")
    return tuple(dict.fromkeys(keys))


def _names(given: str | Path | Mapping[str, str] | None) -> Mapping[str, str]:
    if given is None or isinstance(given, Mapping):
        return given or {}
    found = {}
    for line in _read(given, "names"):
        key, *words = line.split()
        words = words[1:] if len(words) > 1 and words[0].isdigit() else words
        if not words:
            raise OptionError(f"names must have lines of a folder and a name; got {line!r}. Write 'n01440764 tench'.")
        found[key] = " ".join(words).replace("_", " ").strip()
    return found


def _read(path: str | Path, what: str) -> list[str]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OptionError(f"{what} must be a readable text file; {path} is not ({type(error).__name__}). Check the path.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]
