"""Episodes -> tokens with exact roles, through the model's own chat template and processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from mechicl.errors import ContextLengthError, ImageError, RenderError
from mechicl.prompts.batch import Batch, Box
from mechicl.prompts.calling import call, check_canvas, check_company, check_order
from mechicl.prompts.episode import Episode
from mechicl.prompts.patches import Picture, image_boxes
from mechicl.prompts.spans import QUERY, Span, runs
from mechicl.prompts.template import Laid, Piece, Template, check_texts

CONTINUATION: Mapping[str, Mapping[str, int]] = {"paligemma": {"token_type_ids": 1}}
"""What appended answer tokens get, where it is not 0: PaliGemma reads type 0 in both directions, so an answer of type 0 would be seen by the prompt."""

MAX_ASPECT_RATIO = 100
"""Beyond it a picture is a line: some processors refuse it, others make thousands of tokens of it."""


@dataclass(frozen=True, eq=False)
class Rendered:
    """One prompt after the tokenizer, before padding."""

    ids: list[int]
    owners: list[Span | None]
    text: str
    cut: tuple[int, int]
    """Where the last control token stands: token, character."""

    @property
    def tail(self) -> str:
        return self.text[self.cut[1] :]


class Renderer:
    """Turns episodes into a left-padded `Batch` whose every token has a role.

    Args:
        processor: The model's processor (AutoProcessor).
        config: The model's configuration: says which token is a picture's.
        context: Longest prompt, answer included, in tokens; None takes the configuration's max_position_embeddings.
        chat_template: A template to use in place of the processor's own.

    Raises:
        RenderError: the tokenizer gives no offsets, the configuration names no image token, or the processor puts pictures before everything.
    """

    image_token_id: int
    template: Template
    special: list[str]

    def __init__(self, processor: Any, config: Any, *, context: int | None = None, chat_template: str | None = None) -> None:
        check_order(processor)
        self.processor = processor
        self.config = config
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        if self.tokenizer is None or not getattr(self.tokenizer, "is_fast", False):
            raise RenderError(
                f"processor must have a tokenizer that gives offsets; got {type(self.tokenizer).__name__}. Load the fast tokenizer (use_fast=True)."
            )
        image_token = next((v for v in (getattr(config, k, None) for k in ("image_token_id", "image_token_index")) if v is not None), None)
        if image_token is None:
            raise RenderError(
                f"config must name the image token (image_token_id or image_token_index); {type(config).__name__} does not. Use a vision-language model."
            )
        self.image_token_id = int(image_token)
        self.model_type: str = getattr(config, "model_type", "")
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.context: int | None = context if context is not None else getattr(text, "max_position_embeddings", None)
        known = self.image_token_id >= 0  # a language model has none
        self.template = Template(
            processor, chat_template, self.tokenizer.convert_ids_to_tokens(self.image_token_id) if known else "<image>"
        )
        self.continuation: Mapping[str, int] = CONTINUATION.get(self.model_type, {})
        added = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self.special = sorted({*map(str, self.tokenizer.all_special_tokens), *added, self.template.image_token}, key=len, reverse=True)

    def render(self, episodes: Sequence[Episode]) -> Batch:
        """Tokens, spans, candidates and patches of episodes.

        Raises:
            RenderError: exact roles cannot be guaranteed, or the candidates cannot follow the prompt.
            ImageError: a picture is unreadable, empty or a line.
            ContextLengthError: a prompt with its longest answer is longer than the context.
        """
        if not episodes:
            raise RenderError("episodes must be a non-empty list; got none. Draw some first.")
        names = [f"episode {episode.id or k}" for k, episode in enumerate(episodes)]
        for episode, name in zip(episodes, names, strict=True):
            check_texts(episode, self.special, name)
        pictures = [[readable(image, name) for image in episode.images] for episode, name in zip(episodes, names, strict=True)]
        laid = [self.template.lay(episode, name) for episode, name in zip(episodes, names, strict=True)]
        check_company(self.model_type, pictures)
        texts = [one.written for one in laid]
        plain = {"add_special_tokens": False} if self._adds_nothing(texts[0]) else {}
        inputs, offsets = call(self.processor, self.model_type, pictures, texts, **plain)
        check_canvas(self.model_type, pictures, inputs)
        rendered = [self._assign(*row) for row in zip(laid, offsets, episodes, names, strict=True)]
        candidate_ids = self._candidates(rendered, episodes, names)
        self._check_lengths(rendered, candidate_ids, names)
        n_pos = int(inputs["input_ids"].shape[1])
        spans = tuple(runs([Span("pad", 0, 0)] * (n_pos - len(r.ids)) + r.owners) for r in rendered)
        self._check_padding(inputs["input_ids"], rendered, names)
        return Batch(
            inputs=inputs,
            spans=spans,
            answers=tuple(episode.candidates.index(episode.answer) for episode in episodes),
            candidates=tuple(episode.candidates for episode in episodes),
            candidate_ids=candidate_ids,
            patches=self._patches(spans, pictures, inputs),
            episodes=tuple(episodes),
            ids=tuple(episode.id for episode in episodes),
            renderer=self,
        )

    def _adds_nothing(self, text: str) -> bool:
        """Whether the text already begins with the first token, as `apply_chat_template` decides it."""
        return self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)

    def _assign(self, laid: Laid, replaced: list[dict[str, Any]], episode: Episode, name: str) -> Rendered:
        """Tokens of one prompt with the owner of each."""
        text, pieces, regions = expand(laid, replaced)
        encoded = self.tokenizer(text, add_special_tokens=not self._adds_nothing(text), return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        chars = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        if not ids or chars[-1, 1] != len(text):
            raise RenderError(
                f"{name}: a prompt must end where the answer begins; the tokenizer puts {self.tokenizer.convert_ids_to_tokens(ids[-1:])} behind it. "
                "Switch add_eos_token off."
            )
        owners = np.full(len(ids), -1)
        everyone: list[Span] = []
        for piece in pieces:
            inside = (chars[:, 0] < piece.stop) & (chars[:, 1] > piece.start)
            what = text[piece.start : piece.stop]
            claim(owners, inside, len(everyone), piece.owner, name, what)
            everyone.append(piece.owner)
            said = text[chars[inside, 0].min() : chars[inside, 1].max()]
            if piece.owner.role == "label" and said.strip() != what.strip():  # a space may stand in a label's token, another word may not
                raise RenderError(
                    f"{name}: a label's tokens must say the label only; those of {what!r} say {said!r}. Let the chat template put a space or a line break between."
                )
        self._claim_pictures(owners, everyone, np.array(ids), chars, regions, episode, name)
        cut = tail_start(ids, chars, set(self.tokenizer.all_special_ids))
        return Rendered(ids, [everyone[k] if k >= 0 else None for k in owners], text, (cut, int(chars[cut, 0])))

    def _claim_pictures(
        self,
        owners: np.ndarray,
        everyone: list[Span],
        ids: np.ndarray,
        chars: np.ndarray,
        regions: list[tuple[int, int]],
        episode: Episode,
        name: str,
    ) -> None:
        shots = [(k if k < len(episode.shots) else QUERY, s) for k, s in enumerate((*episode.shots, episode.query)) for _ in s.images]
        if not regions and shots:  # a family that expands nothing: its template writes each picture's tokens, as many for each
            regions = shares(chars[ids == self.image_token_id], len(shots))
        if len(regions) != len(shots):
            raise RenderError(
                f"{name}: the processor must place every picture; it placed {len(regions)} of {len(shots)}. Report the family."
            )
        for k, ((start, stop), (which, shot)) in enumerate(zip(regions, shots, strict=True)):
            inside = (chars[:, 0] < stop) & (chars[:, 1] > start) & (ids == self.image_token_id)
            owner = Span("image", 0, 0, which, k, shot.label, shot.item)
            claim(owners, inside, len(everyone), owner, name, f"picture {k}")
            everyone.append(owner)
        if int((ids == self.image_token_id).sum()) != int(sum(everyone[k].role == "image" for k in owners if k >= 0)):
            raise RenderError(f"{name}: every image token must belong to a picture; some do not. Take image tokens out of the texts.")

    def _candidates(
        self, rendered: Sequence[Rendered], episodes: Sequence[Episode], names: Sequence[str]
    ) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Tokens of every candidate behind its prompt, from the joint tokens of prompt and candidate.

        The prompt is tokenised again from its last control token on, where tokenizers cut the text first; where that does not give the prompt's own
        tokens, all of it is.
        """
        texts = [r.tail + self.template.lead + label for r, e in zip(rendered, episodes, strict=True) for label in e.candidates]
        joint = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        every = []
        for r, episode, name in zip(rendered, episodes, names, strict=True):
            row = tuple(self._behind(r, label, next(joint), name) for label in episode.candidates)
            same = next(((a, b) for a in range(len(row)) for b in range(a) if row[a] == row[b]), None)
            if same is not None:
                first, second = (episode.candidates[k] for k in reversed(same))
                raise RenderError(
                    f"{name}: candidates must differ in tokens; {first!r} and {second!r} are both {list(row[same[0]])}. Choose labels that the tokenizer can tell apart."
                )
            every.append(row)
        return tuple(every)

    def _behind(self, r: Rendered, label: str, ids: list[int], name: str) -> tuple[int, ...]:
        """What follows the prompt among the tokens of prompt and label."""
        n = len(r.ids) - r.cut[0]
        if ids[:n] == r.ids[r.cut[0] :] and len(ids) > n:
            return tuple(ids[n:])
        ids = self.tokenizer(r.text + self.template.lead + label, add_special_tokens=not self._adds_nothing(r.text))["input_ids"]
        n = len(r.ids)
        if ids[:n] == r.ids and len(ids) > n:
            return tuple(ids[n:])
        raise RenderError(
            f"{name}: the prompt's tokens must stay the same when candidate {label!r} follows; they do not (the prompt ends with {r.text[-12:]!r}). "
            "Take the space off the end of the prompt or off the start of the label."
        )

    def _check_lengths(self, rendered: Sequence[Rendered], candidates: Sequence[Sequence[Sequence[int]]], names: Sequence[str]) -> None:
        for r, few, name in zip(rendered, candidates, names, strict=True):
            need = len(r.ids) + max(len(ids) for ids in few)
            if self.context is not None and need > self.context:
                raise ContextLengthError(
                    f"{name}: a prompt with its answer must fit the context of {self.context} tokens; got {need} ({len(r.ids)} without the answer). "
                    "Use fewer shots or smaller pictures."
                )

    def _check_padding(self, ids: Tensor, rendered: Sequence[Rendered], names: Sequence[str]) -> None:
        for row, r, name in zip(ids.tolist(), rendered, names, strict=True):
            if row[len(row) - len(r.ids) :] != r.ids:
                raise RenderError(
                    f"{name}: the processor's tokens must be those of the rendered text; they differ, so roles would be guesses. Report the family."
                )

    def _patches(
        self, spans: Sequence[Sequence[Span]], pictures: Sequence[Sequence[Image.Image]], inputs: Mapping[str, Any]
    ) -> tuple[tuple[Mapping[int, Box], ...], ...]:
        every: list[tuple[Mapping[int, Box], ...]] = []
        index = 0
        for row, few in zip(spans, pictures, strict=True):
            mine: list[Mapping[int, Box]] = []
            for k, image in enumerate(few):
                where = [pos for span in row if span.role == "image" and span.image == k for pos in range(span.start, span.stop)]
                boxes = image_boxes(Picture(*image.size, len(where), len(few), index, inputs, self.processor, self.config))
                mine.append({pos: box for pos, box in zip(where, boxes, strict=False) if box is not None})
                index += 1
            every.append(tuple(mine))
        return tuple(every)


def expand(laid: Laid, replaced: Sequence[Mapping[str, Any]]) -> tuple[str, list[Piece], list[tuple[int, int]]]:
    """The text after the processor put the pictures' tokens in, its pieces moved along, and the pictures' stretches of characters."""
    text: list[str] = []
    regions: list[tuple[int, int]] = []
    last = 0
    for one in replaced:
        start, stop = one["span"]
        text += [laid.text[last:start], one["replacement"]]
        regions.append(tuple(one["new_span"]))
        last = stop
    text.append(laid.text[last:])
    ends = np.array([one["span"][1] for one in replaced], dtype=np.int64)
    gained = np.array([0] + [one["new_span"][1] - one["span"][1] for one in replaced], dtype=np.int64)

    def moved(at: int) -> int:
        return at + int(gained[np.searchsorted(ends, at, side="right")])

    return "".join(text), [Piece(p.owner, moved(p.start), moved(p.stop)) for p in laid.pieces], regions


def shares(chars: np.ndarray, n: int) -> list[tuple[int, int]]:
    """Characters of n pictures whose tokens [token, 2] were written out one picture after the other; none where they cannot be shared out evenly, without gaps."""
    each, left = divmod(len(chars), n)
    few = [chars[k * each : (k + 1) * each] for k in range(n)]
    if not each or left or any((one[1:, 0] != one[:-1, 1]).any() for one in few):
        return []
    return [(int(one[0, 0]), int(one[-1, 1])) for one in few]


def claim(owners: np.ndarray, inside: np.ndarray, number: int, owner: Span, name: str, what: str) -> None:
    """Give tokens to an owner.

    Raises:
        RenderError: there is none, or one already belongs to another piece.
    """
    if not inside.any():
        raise RenderError(f"{name}: every piece must have a token; the {owner.role} {what!r} has none. Choose another text.")
    if (owners[inside] >= 0).any():
        raise RenderError(
            f"{name}: a token must belong to one piece; the {owner.role} {what!r} shares one with its neighbour. Put a space or a line break between."
        )
    owners[inside] = number


def tail_start(ids: Sequence[int], chars: np.ndarray, special: set[int]) -> int:
    """Index of the last control token that stands in the text; where there is none, of the first token that does."""
    first = next((k for k in range(len(ids)) if chars[k, 1] > chars[k, 0]), 0)  # a first token that the tokenizer adds is not in the text
    return next((k for k in range(len(ids) - 1, -1, -1) if ids[k] in special and chars[k, 1] > chars[k, 0]), first)


def readable(image: Image.Image, name: str) -> Image.Image:
    """The picture as RGB, upright.

    Raises:
        ImageError: it cannot be decoded, has no pixels, or is more than `MAX_ASPECT_RATIO` times as long as wide.
    """
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except Exception as error:
        raise ImageError(f"{name}: a picture must be readable; decoding it raised {error}. Replace the file.") from error
    width, height = upright.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: a picture must have pixels; got {width} x {height}. Replace it.")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(f"{name}: a picture must be at most {MAX_ASPECT_RATIO} times as long as wide; got {width} x {height}. Crop it.")
    if upright.mode == "RGB":
        return upright
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright.convert("RGBA")).convert("RGB")
    return upright.convert("RGB")
