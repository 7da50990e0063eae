"""What a small model is trained on: repeated sequences, and few-shot episodes of words, pictures or both. The batch of a step depends on nothing
but the seed and the step's number, so a run can be continued anywhere without saving a random state."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Generator, Tensor

from mechicl.data import concepts
from mechicl.data.words import SYLLABLES
from mechicl.prompts.episode import Episode, Shot
from mechicl.training.assembly import (
    Rows,
    Shape,
    Skeleton,
    Tokens,
    assemble,
    compile_skeleton,
    image_token,
    model_inputs,
    pixels,
    strip_template,
    targets,
)
from mechicl.training.glyphs import HELD_OUT, draw_glyphs

if TYPE_CHECKING:
    from mechicl.prompts.batch import Batch, Renders

Split = Literal["train", "held_out"]

INSTRUCTIONS = (
    "Answer with a single word.",
    "Name the picture.",
    "Answer the question with a single word.",
    "Learn the new names from the examples, then name the last one.",
    "You are given pictures with made-up names. Answer with the name.",
)
QUESTIONS = ("What is this?", "This is a", "Name?", "What is the name of this object?")


@dataclass(frozen=True)
class Choice:
    """A family of tasks within a stage, drawn with `weight`; a step draws one value of each field.

    `kind`: "repeat" (a random sequence twice) or "episode". `sizes`: sides of pictures in pixels, 0 for words alone. `words`: whether items carry
    a word. `glyphs`: share of episodes whose pictures are pen strokes, the others are concepts. `instructed`: share of steps with an instruction
    and a question. `lean`: share of steps without the chat template; `kept`: or with so much of it.
    """

    weight: float
    kind: Literal["repeat", "episode"] = "episode"
    n_classes: tuple[int, ...] = (4,)
    n_shots: tuple[int, ...] = (2,)
    sizes: tuple[int, ...] = (28,)
    words: tuple[bool, ...] = (False,)
    glyphs: float = 0.5
    instructed: float = 0.0
    lean: float = 0.0
    kept: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Work:
    """A batch to learn from.

    `inputs`: what the model takes; `wanted` [batch, pos]: tokens that count in the loss; `answer` [batch, pos]: tokens of the query's label;
    `rows` and `order` ([batch, item], class of every item) for episodes.
    """

    inputs: Mapping[str, Any]
    wanted: Bool[Tensor, "batch pos"]
    answer: Bool[Tensor, "batch pos"]
    rows: Rows | None = None
    order: Int[Tensor, "batch item"] | None = None


@dataclass(eq=False)
class Lexicon:
    """Pseudo-words with the tokens they have as an exemplar's label, as an item's text, and as a text behind a picture."""

    words: tuple[str, ...]
    labels: tuple[Tokens, ...]
    texts: tuple[Tokens, ...]
    captions: tuple[Tokens, ...]


@dataclass(eq=False)
class Bench:
    """A model's workbench: skeletons, words and pictures, ready to make batches."""

    model: Any
    processor: Any
    renderer: Renders
    seed: int = 0
    tokens: int = 4096
    """Tokens a training batch should have, about."""
    lexicons: dict[Split, Lexicon] = field(default_factory=dict)
    skeletons: dict[Shape, Skeleton] = field(default_factory=dict)

    def __post_init__(self) -> None:
        words = training_words(3000, random.Random(f"words {self.seed}"))
        self.pad: int = self.processor.tokenizer.pad_token_id
        self.lexicons = {
            "train": read_lexicon(self.renderer, [w for k, w in enumerate(words) if k % 8]),
            "held_out": read_lexicon(self.renderer, words[::8]),
        }
        self.alphabet: Tensor = torch.tensor(sorted({t for few in self.lexicons["train"].labels for t in few}))

    def skeleton(self, shape: Shape) -> Skeleton:
        """The shape's skeleton, rendered the first time it is asked for."""
        if shape not in self.skeletons:
            skeleton = compile_skeleton(self.renderer, shape)
            self.skeletons[shape] = strip_template(skeleton, image_token(self.model.config), shape.kept) if shape.lean else skeleton
        return self.skeletons[shape]

    def work(self, choices: Sequence[Choice], step: int) -> Work:
        """The batch of a training step."""
        rng = random.Random(f"{self.seed} {step}")
        generator = Generator().manual_seed(rng.getrandbits(62))
        choice = rng.choices(choices, [c.weight for c in choices])[0]
        if choice.kind == "repeat":
            return self.repeats(rng, generator)
        shape = draw_shape(choice, rng)
        return self.episodes(shape, self.rows_for(shape), rng, generator, glyphs=choice.glyphs)

    def rows_for(self, shape: Shape) -> int:
        """Episodes that make a batch of about `tokens` tokens."""
        skeleton = self.skeleton(shape)
        length = sum(map(len, skeleton.glue)) + 3 * len(skeleton.slots)
        return max(8, min(64, self.tokens // length))

    def repeats(self, rng: random.Random, generator: Generator) -> Work:
        """Random sequences of 6 to 28 tokens, each twice: the second time all but the first token can be known."""
        n = rng.randint(6, 28)
        batch = min(64, self.tokens // (2 * n))
        once = self.alphabet[torch.randint(len(self.alphabet), (batch, n), generator=generator)]
        ids = torch.cat([once, once], 1)
        wanted = torch.zeros_like(ids, dtype=torch.bool)
        wanted[:, n + 1 :] = True
        bounds = torch.zeros(batch, 1, dtype=torch.long)
        inputs = model_inputs(self.model, Rows(ids, torch.ones_like(ids), bounds, bounds), {})
        return Work(inputs, wanted, wanted)

    def episodes(
        self, shape: Shape, batch: int, rng: random.Random, generator: Generator, *, glyphs: float = 0.5, split: Split = "train"
    ) -> Work:
        """Episodes of one shape, answers appended."""
        lexicon = self.lexicons[split]
        order = draw_orders(shape, batch, rng)
        names = [rng.sample(range(len(lexicon.words)), 2 * shape.n_classes) for _ in range(batch)]
        labels = [[lexicon.labels[i] for i in few[: shape.n_classes]] for few in names]
        texts = lexicon.captions if shape.size else lexicon.texts
        words = [[texts[i] for i in few[shape.n_classes :]] for few in names]
        rows = assemble(self.skeleton(shape), labels, words, order, pad=self.pad)
        where = torch.tensor(order)
        picture: Mapping[str, Any] = {}
        if shape.size:
            drawn = draw_items(where, shape.n_classes, shape.size, generator, glyphs=glyphs, split=split)
            picture = pixels(self.processor, drawn, shape.n_items)
        at = torch.arange(rows.input_ids.shape[1])[None]
        answer = (at >= rows.starts[:, -1:]) & (at < rows.stops[:, -1:])
        return Work(model_inputs(self.model, rows, picture), targets(rows, where), answer, rows, where)


def draw_shape(choice: Choice, rng: random.Random) -> Shape:
    """One shape of a choice."""
    size = rng.choice(choice.sizes)
    lean = rng.random() < choice.lean
    told = rng.random() < choice.instructed and not lean
    return Shape(
        n_classes=rng.choice(choice.n_classes),
        n_shots=rng.choice(choice.n_shots),
        size=size,
        words=rng.choice(choice.words) or not size,
        instruction=rng.choice(INSTRUCTIONS) if told else "",
        question=rng.choice(QUESTIONS) if told and rng.random() < 0.7 else "",
        lean=lean,
        kept=rng.choice(choice.kept) if lean and choice.kept else 0,
    )


def draw_orders(shape: Shape, batch: int, rng: random.Random) -> list[list[int]]:
    """For each episode the class of every item: exemplars shuffled, then the query's."""
    orders = []
    for _ in range(batch):
        order = [c for c in range(shape.n_classes) for _ in range(shape.n_shots)]
        rng.shuffle(order)
        orders.append([*order, rng.randrange(shape.n_classes)])
    return orders


def draw_items(
    order: Int[Tensor, "batch item"], n_classes: int, size: int, generator: Generator, *, glyphs: float, split: Split
) -> UInt8[Tensor, "n 3 size size"]:
    """Fresh pictures for every item, new classes in every episode; the episodes' first share `glyphs` shows pen strokes, the rest concepts."""
    batch, n_items = order.shape
    pens = round(glyphs * batch)
    parts = []
    if pens:
        classes = torch.randint(0, 1 << 39, (pens, n_classes), generator=generator) + (HELD_OUT if split == "held_out" else 0)
        parts.append(draw_glyphs(classes.gather(1, order[:pens]).reshape(-1), size, generator, group=n_items))
    if pens < batch:
        parts.append(draw_concepts(order[pens:], n_classes, size, generator, split))
    return torch.cat(parts)


def draw_concepts(
    order: Int[Tensor, "batch item"], n_classes: int, size: int, generator: Generator, split: Split
) -> UInt8[Tensor, "n 3 size size"]:
    """Pictures of procedural concepts; half of the episodes show concepts of one kind, which are harder to tell apart."""
    draw = np.random.default_rng(int(torch.randint(0, 1 << 62, (1,), generator=generator)))
    pools = concept_pools(split)
    classes = np.stack([pick_classes(n_classes, draw, pools) for _ in order])
    ids = np.take_along_axis(classes, order.numpy(), 1).reshape(-1)
    return torch.from_numpy(concepts.draw_pictures(ids, size, draw)).permute(0, 3, 1, 2).contiguous()


@lru_cache(maxsize=2)
def concept_pools(split: Split) -> tuple[np.ndarray, ...]:
    """Class ids of a split: all of them, then by kind."""
    every = (concepts.class_ids(split), *(concepts.class_ids(split, kinds=(kind,)) for kind in concepts.KINDS))
    return tuple(pool for pool in every if len(pool) >= 16)


def pick_classes(n: int, draw: np.random.Generator, pools: Sequence[np.ndarray]) -> np.ndarray:
    """n different classes, from all kinds or from one."""
    pool = pools[0] if draw.random() < 0.5 else pools[int(draw.integers(len(pools)))]
    return pool[draw.choice(len(pool), n, replace=False)]


def training_words(n: int, rng: random.Random) -> list[str]:
    """n distinct words of 1 to 4 open syllables."""
    # Not data.words.pseudo_words: its stream is another, so trained checkpoints would not grow again to the same bytes from their seeds.
    words: dict[str, None] = {}
    while len(words) < n:
        words["".join(rng.choice(SYLLABLES) for _ in range(rng.choices((1, 2, 3, 4), (1, 6, 6, 4))[0]))] = None
    return list(words)


def read_lexicon(renderer: Renders, words: Sequence[str], chunk: int = 80) -> Lexicon:
    """The tokens of words in their places, read off rendered prompts."""
    labels: dict[str, Tokens] = {}
    texts: dict[str, Tokens] = {}
    captions: dict[str, Tokens] = {}
    for pictures, found in (((), texts), ((Image.new("RGB", (28, 28)),), captions)):
        for start in range(0, len(words), chunk):
            few = words[start : start + chunk]
            shots = tuple(Shot(label=word, images=pictures, text=word, item=word) for word in few)
            batch: Batch = renderer.render([Episode(shots=shots, query=shots[0], candidates=tuple(few))])
            ids = batch.inputs["input_ids"][0].tolist()
            for span in batch.spans[0]:
                if span.role in ("label", "text"):
                    (labels if span.role == "label" else found)[span.item] = tuple(ids[span.start : span.stop])
    return Lexicon(tuple(words), *(tuple(found[w] for w in words) for found in (labels, texts, captions)))
