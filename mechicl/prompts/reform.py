"""Examples with their meaning broken and their form kept, or their form changed and their meaning kept. The query is never touched.

Meaning: `BREAKS` are functions from episode to episode; each keeps every slot, every length of a text in words and every size of a picture. Form:
`FORMS` are other ways to write the same examples, put into `Episode.form`; renderers read it. Token lengths may change: keys before RoPE and values of
the query's own tokens are compared, and those tokens stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from mechicl.errors import EpisodeError, OptionError
from mechicl.prompts.corrupt import permute_labels, title
from mechicl.prompts.disturb import disturb_images
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.form import Form
from mechicl.prompts.vectors import VectorShot

MARKERS = tuple(f"({letter}) " for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")


Reform = Callable[..., Episode]
"""(episode, *, seed=0, donors=()) -> another episode with the same query. `seed` is its only randomness; `donors` are episodes it may take items from."""


def shuffle_words(episode: Episode, *, seed: int = 0, donors: Sequence[Episode] = ()) -> Episode:
    """The words of each exemplar's text are put in another order, inside their slots. Labels stay: they must be candidates (see `other_label`).

    Raises:
        EpisodeError: no text of an exemplar has two different words.
    """
    draw = np.random.default_rng([seed, 10])
    shots = tuple(replace(shot, text=_shuffled(shot.text, draw)) for shot in episode.shots)
    if all(a.text == b.text for a, b in zip(shots, episode.shots, strict=True)):
        raise EpisodeError(
            f"{title(episode)}: an exemplar's text must have two different words to be shuffled; none has. Break pictures or labels instead."
        )
    return replace(episode, shots=shots)


def noise_items(episode: Episode, *, seed: int = 0, donors: Sequence[Episode] = ()) -> Episode:
    """Every exemplar's picture becomes noise of its size; vectors become noise of their length. Labels and texts stay.

    Raises:
        EpisodeError: no exemplar has a picture or a vector.
    """
    if not any(shot.images or isinstance(shot, VectorShot) for shot in episode.shots):
        raise EpisodeError(
            f"{title(episode)}: an exemplar must have a picture to become noise; none has. Use 'other class' or 'other label'."
        )
    if any(isinstance(shot, VectorShot) for shot in episode.shots):
        # a thousand parts of noise to one of the vector: its length is that of a vector again
        return replace(disturb_images(episode, kind="noise", which="all", strength=1000.0, seed=seed), query=episode.query)
    return replace(disturb_images(episode, kind="noise", which="all", strength=1.0, seed=seed), query=episode.query)


def other_class(episode: Episode, *, seed: int = 0, donors: Sequence[Episode] = ()) -> Episode:
    """Every exemplar shows an item of a class that the episode does not have, taken from `donors`; labels stay, so no exemplar names the query.

    Without such a donor each exemplar shows an item of another class of its own episode: with two classes that is a consistent exchange, from which a
    model may answer (wrongly, but surely).

    Raises:
        EpisodeError: there is no item of another class.
    """
    draw = np.random.default_rng([seed, 11])
    shown = {_item(shot) for shot in (*episode.shots, episode.query)}
    foreign = [shot for other in donors if other is not episode for shot in (*other.shots, other.query) if _item(shot) not in shown]
    shots = []
    for shot in episode.shots:
        others = [other for other in foreign if _alike(other, shot)]
        others = others or [other for other in episode.shots if _item(other) != _item(shot) and _alike(other, shot)]
        if not others:
            raise EpisodeError(f"{title(episode)}: an item of another class must exist; there is none. Give donors, or draw more classes.")
        shots.append(_in_place_of(shot, others[int(draw.integers(len(others)))]))
    return replace(episode, shots=tuple(shots))


def other_label(episode: Episode, *, seed: int = 0, donors: Sequence[Episode] = ()) -> Episode:
    """Every exemplar has a candidate label that is not its own, each drawn for itself; at least two different labels remain. Items stay.

    With two candidates that is a consistent exchange, from which a model may answer (wrongly, but surely); with more, classes have no label of their own.

    Raises:
        EpisodeError: it cannot be done so that two labels remain.
    """
    draw = np.random.default_rng([seed, 12])
    others = [[label for label in episode.candidates if label != shot.label] for shot in episode.shots]
    for _ in range(64):
        labels = [few[int(draw.integers(len(few)))] for few in others]
        if len(set(labels)) > 1:
            return replace(episode, shots=tuple(replace(shot, label=label) for shot, label in zip(episode.shots, labels, strict=True)))
    raise EpisodeError(f"{title(episode)}: exemplars must be able to show two other labels; they cannot. Add exemplars of another class.")


def dealt_labels(episode: Episode, *, seed: int = 0, donors: Sequence[Episode] = ()) -> Episode:
    """The exemplars' own labels are dealt out anew among them: the same pictures and the same words, only what goes with what is broken.

    Raises:
        EpisodeError: all exemplars have one label.
    """
    return permute_labels(episode, seed=seed)


def rename(episode: Episode, *, seed: int = 0, donors: Sequence[Episode] = ()) -> Episode:
    """Candidates exchange their names everywhere, the answer's too: another prompt with the same meaning, where names are arbitrary."""
    draw = np.random.default_rng([seed, 13])
    names = dict(zip(episode.candidates, (episode.candidates[int(k)] for k in draw.permutation(len(episode.candidates))), strict=True))
    shots = tuple(replace(shot, label=names[shot.label]) for shot in episode.shots)
    return replace(episode, shots=shots, query=replace(episode.query, label=names[episode.query.label]))


def reorder(episode: Episode, *, seed: int = 0, donors: Sequence[Episode] = ()) -> Episode:
    """Exemplars in another order: another prompt with the same meaning."""
    order = np.random.default_rng([seed, 14]).permutation(len(episode.shots))
    return replace(episode, shots=tuple(episode.shots[int(k)] for k in order))


def in_form(form: Form) -> Reform:
    """The same examples in the form given."""

    def write(episode: Episode, *, seed: int = 0, donors: Sequence[Episode] = ()) -> Episode:
        return replace(episode, form=form)

    return write


def as_form(episode: Episode, *, seed: int = 0, donors: Sequence[Episode] = (), forms: Sequence[str] = ()) -> Episode:
    """One of several forms, the seed says which."""
    names = list(forms)
    return replace(episode, form=FORMS[names[seed % len(names)]])


BREAKS: Mapping[str, Reform] = {
    "shuffled words": shuffle_words,
    "noise": noise_items,
    "other class": other_class,
    "other label": other_label,
    "labels dealt anew": dealt_labels,
}
"""Meaning broken, form kept."""

KEEPS: Mapping[str, Reform] = {"order": reorder, "names": rename}
"""Other prompts with the same meaning and form: what tells a factor's effect from the effect of any change (replicates)."""

FORMS: Mapping[str, Form] = {
    "template": Form(question="Name the thing shown.", before_label="Answer: "),
    "separators": Form(before_item="### ", before_label="=> "),
    "option markers": Form(markers=MARKERS),
    "label first": Form(label_first=True),
    "swapped": Form(swapped=True),
    "one turn": Form(turns="one"),
    "pictures first": Form(pictures_first=True),
}
"""Form changed, meaning kept. "one turn" puts several pictures into one user's turn, which the bundled model never saw; so do "label first" (with a chat template)
and "pictures first"."""


def reform(name: str | Form | Sequence[str] | Callable[..., Episode]) -> Reform:
    """A transform by its name.

    Args:
        name: A key of `BREAKS` or `FORMS`; a `Form`; several keys of `FORMS`, one of which is taken by the seed; or a function of your own.

    Raises:
        OptionError: there is none of that name.
    """
    if isinstance(name, Form):
        return in_form(name)
    if isinstance(name, str):
        if name in BREAKS:
            return BREAKS[name]
        if name in FORMS:
            return in_form(FORMS[name])
    elif callable(name):
        return name
    elif name and all(one in FORMS for one in name):
        return partial(as_form, forms=tuple(name))
    known = ", ".join((*BREAKS, *FORMS))
    raise OptionError(f"a transform must be one of {known}, a Form, several forms' names, or a function; got {name!r}. Pick one of them.")


def _shuffled(text: str, draw: np.random.Generator) -> str:
    words = text.split(" ")
    if len(set(words)) < 2:
        return text
    while (again := [words[int(k)] for k in draw.permutation(len(words))]) == words:
        pass
    return " ".join(again)


def _item(shot: Shot) -> str:
    return shot.item or shot.text or shot.label


def _in_place_of(shot: Shot, other: Shot) -> Shot:
    """The other item under this shot's label, its pictures in this shot's sizes."""
    images = tuple(
        image if image.size == old.size else image.convert("RGB").resize(old.size)
        for image, old in zip(other.images, shot.images, strict=True)
    )
    return replace(other, label=shot.label, images=images)


def _alike(shot: Shot, like: Shot) -> bool:
    """Whether a shot can stand in the other's place: as many pictures, words or none, vectors of the same width."""
    if isinstance(like, VectorShot) and isinstance(shot, VectorShot):
        return like.vector.shape == shot.vector.shape and (like.second is None) == (shot.second is None)
    if isinstance(like, VectorShot) or isinstance(shot, VectorShot):
        return False
    return len(shot.images) == len(like.images) and bool(shot.text) == bool(like.text)
