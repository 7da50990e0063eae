"""An episode as the text of a prompt, with the exact place of every piece of it.

The model's own chat template is rendered twice: once with a private-use character before and after every piece (instruction, text, question,
label), once plainly. Taking the marks out of the first must give the second, character by character; the marks then say where each piece
stands. Nothing is ever searched for in the rendered text, so a label that also occurs in the instruction cannot be mistaken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from PIL import Image

from mechicl.errors import RenderError
from mechicl.prompts.calling import first_words, leaves_words, takes_one_list
from mechicl.prompts.episode import Episode, Shot
from mechicl.prompts.spans import NO_SHOT, QUERY, Span

FIRST_MARK = 0xF0000
LAST_MARK = 0xFFFFD
MARKS = re.compile(f"[{chr(FIRST_MARK)}-{chr(LAST_MARK)}]")

Message = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A stretch [start, stop) of characters of a prompt; `owner` says what it is for (its own start and stop mean nothing)."""

    owner: Span
    start: int
    stop: int


@dataclass(frozen=True)
class Laid:
    """A prompt's text before pictures are expanded, with its pieces in order; `written` is what goes into the processor."""

    text: str
    pieces: tuple[Piece, ...]
    written: str = ""


class Marker:
    """Hands out marked and plain copies of the pieces of one prompt, and finds the marks again."""

    def __init__(self) -> None:
        self.owners: list[Span] = []
        self.texts: list[str] = []

    def __call__(self, text: str, owner: Span) -> str:
        self.owners.append(owner)
        self.texts.append(text)
        mark = FIRST_MARK + 2 * (len(self.owners) - 1)
        if mark + 1 > LAST_MARK:
            raise RenderError(f"an episode must have fewer than {(LAST_MARK - FIRST_MARK) // 2} pieces of text; got more. Use fewer shots.")
        return f"{chr(mark)}{text}{chr(mark + 1)}"

    def read(self, marked: str, name: str) -> Laid:
        """The plain text and the pieces of a marked one.

        Raises:
            RenderError: a piece is missing, doubled or changed.
        """
        plain: list[str] = []
        at: dict[int, list[int]] = {}
        length = last = 0
        for match in MARKS.finditer(marked):
            plain.append(marked[last : match.start()])
            length += match.start() - last
            last = match.end()
            at.setdefault(ord(match.group()) - FIRST_MARK, []).append(length)
        plain.append(marked[last:])
        text = "".join(plain)
        pieces = []
        for k, (owner, piece) in enumerate(zip(self.owners, self.texts, strict=True)):
            opened, closed = at.get(2 * k, []), at.get(2 * k + 1, [])
            if len(opened) != 1 or len(closed) != 1:
                raise RenderError(
                    f"{name}: the chat template must write every piece once; it wrote the {owner.role} {piece!r} {len(opened)} times. "
                    "Give Renderer another chat_template."
                )
            if text[opened[0] : closed[0]] != piece:
                raise RenderError(
                    f"{name}: the chat template must write the {owner.role} as it is; {piece!r} became {text[opened[0] : closed[0]]!r}. "
                    "Change the text, or give Renderer another chat_template."
                )
            pieces.append(Piece(owner, opened[0], closed[0]))
        return Laid(text, tuple(sorted(pieces, key=lambda p: p.start)))


def unmarked(text: str, owner: Span) -> str:
    """What stands in for a `Marker` when the prompt is rendered plainly."""
    return text


class Template:
    """Writes episodes as text, through a processor's chat template or, where it has none, as plain lines.

    The plain lines are: the instruction; for every shot its pictures, its text, its question, its label, each on a line of its own (the question
    directly behind the pictures); the query likewise, without a label. `image_token` is the model's, for a processor that names none.
    """

    writes_out: bool

    def __init__(self, processor: Any, chat_template: str | None = None, image_token: str = "<image>") -> None:
        self.processor = processor
        self.chat_template = chat_template or getattr(processor, "chat_template", None)
        if isinstance(self.chat_template, dict):
            self.chat_template = self.chat_template.get("default")
        own = getattr(processor, "image_token", None) or getattr(processor.tokenizer, "image_token", None)
        self.image_token: str = str(own or image_token)
        # the processor knows of no token, or leaves it alone, so the template writes all of a picture's (PP-Chart2Table, BLIP-2)
        self.writes_out = own is None or leaves_words(processor)

    def lay(self, episode: Episode, name: str) -> Laid:
        """The prompt's text, ready for the tokenizer but for the pictures, and its pieces.

        Raises:
            RenderError: the template drops, doubles or changes a piece or a picture.
        """
        marker = Marker()
        laid = marker.read(self.layout(self.write(episode, marker, name), episode), name)
        written = self.write(episode, unmarked, name)
        plain = self.layout(written, episode)
        if laid.text != plain:
            at = next((i for i, (a, b) in enumerate(zip(laid.text, plain, strict=False)) if a != b), min(len(plain), len(laid.text)))
            raise RenderError(
                f"{name}: the chat template must not look at the text it is given; with marks around the pieces it wrote "
                f"{laid.text[at - 20 if at > 20 else 0 : at + 20]!r} in place of {plain[at - 20 if at > 20 else 0 : at + 20]!r}. "
                "Take spaces and line breaks off the ends of labels and questions, or give Renderer another chat_template."
            )
        n_marks, n_pictures = laid.text.count(self.image_token), len(episode.images)
        even = n_pictures and n_marks >= n_pictures and n_marks % n_pictures == 0
        if n_marks != n_pictures and not (self.writes_out and even):
            raise RenderError(
                f"{name}: the chat template must write one {self.image_token} per picture{' (or as many for each)' if self.writes_out else ''}; it wrote "
                f"{n_marks} for {n_pictures} pictures. Give Renderer another chat_template."
            )
        return replace(laid, written=written)

    def layout(self, text: str, episode: Episode) -> str:
        """What the processor itself does to a text before it expands pictures (PaliGemma and Mllama put the first token in)."""
        prepare = getattr(self.processor, "prepare_inputs_layout", None)
        if prepare is None or not episode.images or takes_one_list(self.processor):
            return text
        return prepare(images=[list(episode.images)], text=[text])[1][0]

    def write(self, episode: Episode, mark: Marker | Any, name: str) -> str:
        """The prompt's text, pieces passed through `mark`."""
        if not self.chat_template:
            return self._begun(self._lines(episode, mark))
        try:
            return self._begun(self._render(self._messages(episode, mark)))
        except RenderError:
            raise
        except Exception as error:  # a template may raise anything
            raise RenderError(
                f"{name}: the chat template must accept the episode; it raised {error}. Give Renderer another chat_template."
            ) from error

    def _begun(self, text: str) -> str:
        """The text with what the processor would write before it."""
        first = first_words(self.processor)
        return text if text.startswith(first) else first + text

    @cached_property
    def lead(self) -> str:
        """What the template writes between the end of a prompt and the answer, e.g. a space; "" where a prompt is not how an answered one begins."""
        if not self.chat_template:
            return ""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        prompt = self._render([turn])
        answered = self._render([turn, self._assistant(chr(FIRST_MARK))], more=False)
        return answered[len(prompt) : answered.index(chr(FIRST_MARK))] if answered.startswith(prompt) else ""

    def _render(self, messages: Sequence[Message], more: bool = True) -> str:
        return self.processor.apply_chat_template(list(messages), chat_template=self.chat_template, add_generation_prompt=more)

    def _messages(self, episode: Episode, mark: Any) -> list[Message]:
        messages: list[Message] = []
        opening: list[Message] = []
        if episode.instruction:
            marked = mark(episode.instruction, Span("instruction", 0, 0))
            if self._system_style == "list":
                messages.append({"role": "system", "content": [{"type": "text", "text": marked}]})
            elif self._system_style == "string":
                messages.append({"role": "system", "content": marked})
            else:
                opening = [{"type": "text", "text": marked + "\n"}]
        if episode.form.one_turn and episode.shots:
            content = [*opening, *self._examples(episode, mark), *self._parts(episode.query, QUERY, episode.question, mark)]
            if self._lifts_pictures:
                content.sort(key=lambda part: part["type"] == "text")
            return [*messages, {"role": "user", "content": joined(content)}]
        for k in range(len(episode.shots)):
            messages.append({"role": "user", "content": opening + joined(self._item(episode, k, mark))})
            messages.append(self._assistant(self._label(episode, k, mark)))
            opening = []
        messages.append({"role": "user", "content": opening + self._parts(episode.query, QUERY, episode.question, mark)})
        return messages

    def _examples(self, episode: Episode, mark: Any) -> list[Message]:
        """All exemplars as the parts of one turn, each with the end of its line."""
        form, parts = episode.form, []
        if form.pictures_first:
            parts += [{"type": "image"} for shot in episode.shots for _ in shot.images]
        for k in range(len(episode.shots)):
            item = [part for part in self._item(episode, k, mark) if part["type"] == "text" or not form.pictures_first]
            label = [{"type": "text", "text": self._label(episode, k, mark)}]
            gap = [{"type": "text", "text": form.separator}] if item else []
            parts += [*label, *gap, *item] if form.label_first else [*item, *gap, *label]
            parts.append({"type": "text", "text": form.between})
        return parts

    def _item(self, episode: Episode, k: int, mark: Any) -> list[Message]:
        """Pictures and texts of exemplar k, as the episode's form orders them."""
        form = episode.form
        parts = self._parts(episode.shots[k], k, episode.question if form.question is None else form.question, mark)
        if form.swapped:
            parts = [*(p for p in parts if p["type"] == "text"), *(p for p in parts if p["type"] == "image")]
        return [{"type": "text", "text": form.before_item}, *parts] if form.before_item else parts

    def _label(self, episode: Episode, k: int, mark: Any) -> str:
        """The label of exemplar k with what stands before and behind it."""
        shot = episode.shots[k]
        owner = Span("label", 0, 0, k, None, shot.label, shot.item)
        return episode.form.lead(shot.label, episode.candidates) + mark(shot.label, owner) + episode.form.after_label

    def _parts(self, shot: Shot, which: int, question: str, mark: Any) -> list[Message]:
        owner = Span("text", 0, 0, which, None, shot.label, shot.item)
        texts = [mark(shot.text, owner)] if shot.text else []
        texts += [mark(question, replace(owner, role="question"))] if question else []
        return [{"type": "image"} for _ in shot.images] + ([{"type": "text", "text": "\n".join(texts)}] if texts else [])

    def _assistant(self, text: str) -> Message:
        return {"role": "assistant", "content": [{"type": "text", "text": text}] if self._answer_style == "list" else text}

    @cached_property
    def _answer_style(self) -> str:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        for style, content in (("list", [{"type": "text", "text": chr(FIRST_MARK)}]), ("string", chr(FIRST_MARK))):
            if self._accepts([turn, {"role": "assistant", "content": content}, turn]):
                return style
        raise RenderError(
            "chat_template must write user turns with pictures and assistant turns with text; this one does not. Give Renderer another chat_template."
        )

    @cached_property
    def _system_style(self) -> str:
        """How the template takes a system turn beside pictures: "list" or "string" content, or "fold" into the first user turn."""
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        for style, content in (("list", [{"type": "text", "text": chr(FIRST_MARK)}]), ("string", chr(FIRST_MARK))):
            if self._accepts([{"role": "system", "content": content}, turn]):
                return style
        return "fold"

    @cached_property
    def _lifts_pictures(self) -> bool:
        """Whether the template itself writes all pictures of a turn before its texts; it may then put spaces between the texts."""
        turn = {"role": "user", "content": [{"type": "text", "text": chr(FIRST_MARK)}, {"type": "image"}, {"type": "text", "text": "?"}]}
        written = self._render([turn])
        return written.find(self.image_token) < written.find(chr(FIRST_MARK))

    @cached_property
    def _ends_lines(self) -> bool:
        """Whether the processor itself ends a prompt with a line break (PaliGemma does)."""
        picture = Image.new("RGB", (28, 28))
        prepare = getattr(self.processor, "prepare_inputs_layout", None)
        return prepare is not None and prepare(images=[[picture]], text=[self.image_token + "?"])[1][0].endswith("\n")

    def _accepts(self, messages: Sequence[Message]) -> bool:
        try:
            return self._render(messages).count(chr(FIRST_MARK)) == 1
        except Exception:  # whatever a template raises, it does not accept this
            return False

    def _lines(self, episode: Episode, mark: Any) -> str:
        lines = [mark(episode.instruction, Span("instruction", 0, 0))] if episode.instruction else []
        form = episode.form

        def line(parts: Sequence[Message]) -> str:
            return "".join(self.image_token if part["type"] == "image" else part["text"] for part in parts)

        if episode.shots and form.one_turn:
            lines.append(line(self._examples(episode, mark)).removesuffix(form.between))
        else:
            pairs = [line(self._item(episode, k, mark)) + form.separator + self._label(episode, k, mark) for k in range(len(episode.shots))]
            lines += [form.between.join(pairs)] if pairs else []
        lines.append(line(self._parts(episode.query, QUERY, episode.question, mark)))
        return "\n".join(lines) + ("" if self._ends_lines else "\n")


def joined(parts: Sequence[Message]) -> list[Message]:
    """Parts of a turn with neighbouring texts as one: a template may put spaces or line breaks between parts."""
    out: list[Message] = []
    for part in parts:
        if out and part["type"] == "text" and out[-1]["type"] == "text":
            out[-1] = {"type": "text", "text": out[-1]["text"] + part["text"]}
        else:
            out.append(part)
    return out


def check_texts(episode: Episode, special: Sequence[str], name: str) -> None:
    """Refuse texts that the tokenizer would read as control tokens, and those that hold our marks.

    Raises:
        RenderError: names the text and the token.
    """
    texts = {"instruction": episode.instruction, "question": episode.question}
    for k, shot in enumerate((*episode.shots, episode.query)):
        which = f"shot {k}" if k < len(episode.shots) else "the query"
        texts |= {f"text of {which}": shot.text, f"label of {which}": shot.label}
    form = episode.form
    written = {
        "question": form.question or "",
        "words before an item": form.before_item,
        "words before a label": form.before_label,
        "words behind a label": form.after_label,
    }
    written |= {"separator": form.separator, "words between": form.between, **{f"marker {k}": text for k, text in enumerate(form.markers)}}
    texts |= {f"{what} of the form": text for what, text in written.items()}
    texts |= {f"candidate {k}": label for k, label in enumerate(episode.candidates)}
    for what, text in texts.items():
        for token in special:
            if token in text:
                raise RenderError(f"{name}: {what} must not contain the control token {token!r}; got {text!r}. Write it otherwise.")
        if MARKS.search(text):
            raise RenderError(f"{name}: {what} must not contain characters of the private-use plane U+F0000; got {text!r}. Replace them.")


__all__ = ["NO_SHOT", "Laid", "Marker", "Piece", "Template", "check_texts"]
