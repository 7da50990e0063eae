"""Hand-drawn characters that the user has on disk, in Omniglot's layout: FOLDER/alphabet/character/picture.png.

The folder may also hold the two halves of the original release (images_background, images_evaluation), one level above the alphabets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from mechicl.data.banks import ImageBank
from mechicl.errors import ImageError, OptionError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff"})
HALVES = ("images_background", "images_evaluation")
SHOWN = 5
"""Problems named in an error."""


@dataclass(frozen=True)
class OmniglotReport:
    """What a folder holds.

    Attributes:
        characters: For each character ("alphabet/character") its pictures, in order.
        problems: What is wrong, each with its path within the folder.
    """

    folder: str
    characters: dict[str, tuple[Path, ...]]
    problems: tuple[str, ...]

    @property
    def n_alphabets(self) -> int:
        """Number of alphabets."""
        return len({name.rsplit("/", 1)[0] for name in self.characters})

    @property
    def fewest(self) -> int:
        """Pictures of the character that has the fewest."""
        return min(map(len, self.characters.values()), default=0)

    def __str__(self) -> str:
        most = max(map(len, self.characters.values()), default=0)
        counts = f"{self.fewest}" if self.fewest == most else f"{self.fewest} to {most}"
        lines = [f"{self.folder}: {self.n_alphabets} alphabets, {len(self.characters)} characters, {counts} pictures each."]
        lines += [f"- {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"- and {len(self.problems) - SHOWN} more")
        return "\n".join(lines)


def check_omniglot(folder: str | Path, *, least: int = 2) -> OmniglotReport:
    """Look through a folder and open every picture, without keeping any.

    Args:
        folder: The folder of alphabets, or of the release's two halves.
        least: Fewest pictures that a character must have.
    """
    root = Path(folder)
    if not root.is_dir():
        return OmniglotReport(str(folder), {}, ("there is no such folder",))
    characters: dict[str, tuple[Path, ...]] = {}
    problems: list[str] = []
    for name, place in _places(root, problems):
        pictures = sorted(path for path in place.iterdir() if path.is_file() and not path.name.startswith("."))
        strangers = [path for path in pictures if path.suffix.lower() not in SUFFIXES]
        problems += [f"{path.relative_to(root)}: not a picture by its name" for path in strangers]
        good = tuple(path for path in pictures if path not in strangers and _opens(path, root, problems))
        if len(good) < least:
            problems.append(f"{place.relative_to(root)}: {len(good)} pictures where at least {least} are needed")
        else:
            characters[name] = good
    if not characters and not problems:
        problems.append("no alphabet/character folders with pictures in them")
    return OmniglotReport(str(folder), characters, tuple(problems))


def _places(root: Path, problems: list[str]) -> Iterator[tuple[str, Path]]:
    """(name, folder) of every character."""
    halves = [root / half for half in HALVES if (root / half).is_dir()]
    for top in halves or [root]:
        for alphabet in _folders(top):
            found = _folders(alphabet)
            if not found:
                problems.append(f"{alphabet.relative_to(root)}: an alphabet without characters")
            for character in found:
                yield f"{alphabet.name}/{character.name}", character


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _opens(path: Path, root: Path, problems: list[str]) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problems.append(f"{path.relative_to(root)}: cannot be read ({type(error).__name__})")
        return False
    return True


def omniglot_bank(folder: str | Path, size: int = 28, *, strict: bool = True, least: int = 2) -> ImageBank:
    """The characters of a folder as a bank, ink 1 on paper 0, one channel.

    Args:
        folder: See the module.
        size: Side to which pictures are brought, pixels.
        strict: Any problem is an error. Else what is unusable is left out, as long as two characters are left.
        least: Fewest pictures of a character. All characters get as many as the poorest one has; the first ones are taken.

    Raises:
        ImageError: with the report: no such folder, no characters, unreadable pictures, too few of them.
        OptionError: pictures of fewer than 8 pixels.
    """
    if size < 8 or least < 1:
        raise OptionError(f"size must be at least 8 pixels and least at least 1; got {size} and {least}. Keep larger pictures.")
    report = check_omniglot(folder, least=least)
    if len(report.characters) < 2 or (strict and report.problems):
        raise ImageError(
            f"folder must hold alphabet/character/picture.png with at least {least} readable pictures of two characters or more; got\n{report}\n"
            "Repair it, or pass strict=False to leave out what is unusable."
        )
    rows = []
    for name, paths in report.characters.items():
        try:
            rows.append(np.stack([ink(path, size) for path in paths[: report.fewest]]))
        except (OSError, SyntaxError, ValueError) as error:  # a header that reads and a body that does not
            raise ImageError(
                f"pictures of {name} must be readable to the end; got {type(error).__name__}: {error}. Repair them."
            ) from error
    return ImageBank(torch.from_numpy(np.stack(rows))[:, :, None], tuple(report.characters))


def ink(path: Path, size: int) -> np.ndarray:
    """A picture as ink, uint8 [size, size]: 255 is ink. Drawings are dark on light paper; one that is mostly dark is taken as it is."""
    with Image.open(path) as image:
        grey = np.asarray(image.convert("L").resize((size, size), Image.Resampling.BOX))
    return grey if grey.mean() < 127.5 else 255 - grey
