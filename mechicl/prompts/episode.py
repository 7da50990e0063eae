"""Episodes: the unit of in-context learning, before any model has seen it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from mechicl.errors import EpisodeError, ImageError
from mechicl.prompts.form import PLAIN, Form


@dataclass(frozen=True, eq=False)
class Shot:
    """One item with its label. The query is a Shot too: its label is the answer.

    `images` come before `text` in the prompt. `item` names what is shown (the class), the same for every picture of a class.
    """

    label: str
    images: tuple[Image.Image, ...] = ()
    text: str = ""
    item: str = ""

    def __post_init__(self) -> None:
        for image in self.images:
            if not isinstance(image, Image.Image):
                raise ImageError(f"images must be PIL pictures; got {type(image).__name__}. Open the file with PIL.Image.open.")
        if not self.images and not self.text:
            raise EpisodeError("a shot must have a picture or a text; got neither. Give images=(picture,) or text=...")
        if not self.label.strip():
            raise EpisodeError("label must be a non-empty string; got an empty one. Give each shot the name that the model should say.")


@dataclass(frozen=True, eq=False)
class Episode:
    """A few-shot question: exemplars, then a query whose label the model must give.

    `candidates` are the labels that compete, each once; the answer is among them. `question` is asked after every item, exemplars included.
    `form`: how the exemplars are written; see `mechicl.prompts.reform` for others than the plain one.
    """

    shots: tuple[Shot, ...]
    query: Shot
    candidates: tuple[str, ...]
    instruction: str = ""
    question: str = ""
    id: str = ""
    form: Form = PLAIN

    def __post_init__(self) -> None:
        where = f"episode {self.id!r}: " if self.id else ""
        if len(set(self.candidates)) != len(self.candidates):
            raise EpisodeError(f"{where}candidates must be distinct; got {list(self.candidates)}. List each label once.")
        if len(self.candidates) < 2:
            raise EpisodeError(
                f"{where}candidates must be at least two labels; got {list(self.candidates)}. With one class nothing can be told apart."
            )
        if self.query.label not in self.candidates:
            raise EpisodeError(
                f"{where}the answer must be a candidate; got {self.query.label!r} with candidates {list(self.candidates)}. Add it to candidates."
            )
        for k, shot in enumerate(self.shots):
            if shot.label not in self.candidates:
                raise EpisodeError(
                    f"{where}the label of shot {k} must be a candidate; got {shot.label!r} with candidates {list(self.candidates)}. Add it to candidates."
                )

    @property
    def answer(self) -> str:
        """The right label of the query."""
        return self.query.label

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """Every picture, in prompt order, the query's last."""
        return tuple(image for shot in (*self.shots, self.query) for image in shot.images)

    def without_shots(self) -> Episode:
        """The zero-shot control: the same question with no example."""
        return replace(self, shots=())


def check_episodes(episodes: Sequence[Episode], *, images: bool = True) -> None:
    """Refuse what no analysis can use, before any long work starts.

    Raises:
        EpisodeError: the list is empty, an episode has no shot, or all shots of an episode have one label.
        ImageError: `images` is set and an episode has no picture at all.
    """
    if not episodes:
        raise EpisodeError("episodes must be a non-empty list; got none. Draw some, e.g. mechicl.data.concepts.draw(64, seed=0).")
    for k, episode in enumerate(episodes):
        name = episode.id or str(k)
        if not episode.shots:
            raise EpisodeError(
                f"episode {name}: shots must not be empty; got none. In-context learning needs examples (zero-shot is run as a control by itself)."
            )
        if len({shot.label for shot in episode.shots}) < 2:
            raise EpisodeError(
                f"episode {name}: shots must show at least two labels; got only {episode.shots[0].label!r}. Add exemplars of another class."
            )
        if images and not episode.images:
            raise ImageError(f"episode {name}: at least one picture is needed; got none. Pass images=False for text-only episodes.")


def check_pictures(episodes: Sequence[Episode]) -> None:
    """Read every picture that PIL has only opened so far, so that a damaged file is an error before any work; nothing stays in memory.

    Raises:
        ImageError: a picture cannot be read; names the episode, the picture and its file.
    """
    seen: set[int] = set()
    for k, episode in enumerate(episodes):
        for j, image in enumerate(episode.images):
            if id(image) in seen:
                continue
            seen.add(id(image))
            file = getattr(image, "filename", "")
            try:
                if not getattr(image, "tile", None):  # its pixels are in memory
                    continue
                if file:
                    with Image.open(file) as again:
                        again.load()
                else:
                    image.load()
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ImageError(
                    f"episode {episode.id or k}: picture {j} must be readable; got {file or 'data in memory'} ({error}). Replace the file, or leave the episode out."
                ) from error
