"""Hand-made programs: toy transformers whose circuit is known edge by edge, to hold methods of finding circuits against.

An edge counts as part of a program's circuit if it carries something on the program's own pairs of prompts: with every other input of every part as in the clean run,
the sender's output of the corrupt run in what this one receiver reads changes the answer's logit ("noising"). The circuits are conjunctions: every listed edge is
needed, and restoring a single one in the corrupt run ("denoising") does not bring the answer back, because the others are still corrupt. Parts that a pair leaves equal carry
nothing, whatever the weights say: that is why the pairs change every token and, by default, the places of all tokens but the first too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, cast

import torch

from mechicl.errors import OptionError
from mechicl.models.planted import planted_induction
from mechicl.models.programs_pairs import conditional_pairs, induction_pairs, two_back_pairs
from mechicl.models.programs_parts import FIRST_LABEL, WORDS, Builder
from mechicl.models.toys.model import ToyBlock, ToyTransformer
from mechicl.prompts.corrupt import Pairs
from mechicl.results.nodes import Edge, Receiver, Sender, senders

Corrupts = Literal["tokens and places", "tokens"]
"""What the corrupt prompts change. tokens and places: every token, and (through `position_ids`) the place of every token but the first; then the reading of places is
part of the circuit. tokens: every token only; edges that carry places then carry nothing and are not listed."""

Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Program:
    """A model with the edges of its circuit.

    Attributes:
        name: "induction", "two-back", "conditional (mlp)" or "conditional (q)".
        model: Solves its prompts exactly.
        pairs: (n, seed) -> n pairs of prompts; see the program for what differs.
        edges: Exactly the edges that carry something on these pairs.
        idle: Heads that take no part; some look like those that do.
        corrupts: What the pairs change.
    """

    name: str
    model: ToyTransformer
    pairs: Callable[[int, int], Pairs]
    edges: frozenset[Edge]
    idle: tuple[Head, ...]
    corrupts: Corrupts | str

    @property
    def nodes(self) -> tuple[Sender, ...]:
        """The senders of the circuit's edges, in the order of execution."""
        return tuple(sorted({edge.sender for edge in self.edges}, key=_order(self.model).index))


def induction(
    *,
    n_distractors: int = 2,
    n_previous: int = 1,
    n_matching: int = 1,
    corrupts: Corrupts | str = "tokens and places",
    sharpness: float = 40.0,
    seed: int = 0,
) -> Program:
    """[item, label, item, label, ..., item]: the label that followed the item before. The circuit of `planted_induction`, whose idle heads partly imitate it.

    Layer 0: a previous-token head (queries and keys read places, values read tokens). Layer 1: the matching head's keys read what the previous-token head wrote, its
    queries and values read tokens; its output is the logits. In the pairs items and labels are dealt out anew to all places and the query shows another item.

    Args:
        n_distractors: Idle heads in each layer (at least; the layers have equally many heads).
        n_previous: Previous-token heads that do the same.
        n_matching: Matching heads that do the same: each carries its share of the logit.
        corrupts: What the pairs change.
        sharpness: Attention score of a match, and logit of a label fully attended to. Large values saturate the softmax, and gradients there vanish.
        seed: Places of the heads, weights of the idle ones.
    """
    moved = _check(n_distractors, corrupts)
    n_heads = max(n_previous, n_matching) + n_distractors
    planted = planted_induction(n_heads=n_heads, n_previous=n_previous, n_matching=n_matching, sharpness=sharpness, seed=seed)
    _imitate(planted.model, planted.previous_token)
    _imitate(planted.model, planted.matching)
    found = set[Edge]()
    for head in planted.previous_token:
        found |= _reads(head, v=[None]) | _finds(head, moved)
    for head in planted.matching:
        found |= _reads(head, q=[None], k=planted.previous_token, v=[None]) | _answers(planted.model, [head])
    return Program("induction", planted.model, lambda n, seed: induction_pairs(n, seed, moved), frozenset(found), planted.idle, corrupts)


def two_back(
    *, n_distractors: int = 2, n_tokens: int = 8, corrupts: Corrupts | str = "tokens and places", sharpness: float = 40.0, seed: int = 0
) -> Program:
    """[a, b, c, ..., y, z]: the token two before the last, by two steps of one: layer 0 fetches the token before, layer 1 fetches what the token before has fetched.

    The values of the head in layer 1 read the head in layer 0: a head-to-head edge by v. In the pairs no token keeps its place.

    Args:
        n_distractors: Idle heads in each layer.
        n_tokens: Length of the prompts, 4..32.
        corrupts: What the pairs change.
        sharpness: As in `induction`.
        seed: Places of the heads, weights of the idle ones.
    """
    moved = _check(n_distractors, corrupts, n_tokens)
    build = Builder("two-back copy", ("one", "out"), n_layers=2, n_heads=1 + n_distractors, n_ctx=n_tokens, sharpness=sharpness, seed=seed)
    (first,), (second,) = build.draw_heads(1), build.draw_heads(1)
    build.fetch(0, first, 1, "content", "one")
    build.fetch(1, second, 1, "one", "out")
    build.imitate(0, [first])
    build.imitate(1, [second])
    found = set[Edge]()
    for head, values in (((0, first), None), ((1, second), (0, first))):
        found |= _reads(head, v=[values]) | _finds(head, moved)
    found |= _answers(build.model, [(1, second)])
    idle = _idle(build.model, [(0, first), (1, second)])
    return Program("two-back", build.model, lambda n, seed: two_back_pairs(n, seed, n_tokens, moved), frozenset(found), idle, corrupts)


def conditional(
    *,
    gate: Literal["mlp", "q"] | str = "mlp",
    n_distractors: int = 2,
    n_shots: int = 3,
    corrupts: Corrupts | str = "tokens and places",
    sharpness: float = 40.0,
    seed: int = 0,
) -> Program:
    """Pairs of tokens of two modalities and a flag that says which one of the last pair is the answer.

    mlp: [x, y, x, y, ..., flag]. Heads of layer 0 fetch the last x and the last y; the MLP of layer 0 reads the flag and lets one of them through to the logits. Layer 1
    is idle, its MLP too.
    q: [flag, x, y, x, y, ..., mark]. A head of layer 0 brings the flag to the last token, where the queries of two heads of layer 1 read it: the one whose modality
    it names fetches its token, the other looks at the first place and brings nothing. In the pairs no x or y keeps its place and the flag is the other one.

    Half the prompts ask for x, half for y, so each head matters in half of them.

    Args:
        gate: What decides.
        n_distractors: Idle heads in each layer (at least).
        n_shots: Pairs of tokens, 2..15.
        corrupts: What the pairs change.
        sharpness: As in `induction`.
        seed: Places of the heads, weights of the idle ones.
    """
    moved = _check(n_distractors, corrupts)
    if gate not in ("mlp", "q"):
        raise OptionError(f'gate must be "mlp" or "q"; got {gate!r}. Choose one.')
    if not 2 <= n_shots <= 15:
        raise OptionError(f"n_shots must be 2..15; got {n_shots}. Choose how many pairs of tokens a prompt has.")
    n_ctx = 2 * n_shots + (1 if gate == "mlp" else 2)
    settled = (_conditional_mlp if gate == "mlp" else _conditional_q)(n_distractors, n_ctx, sharpness, seed, moved)
    model, found, used = settled
    return Program(
        f"conditional ({gate})", model, lambda n, seed: conditional_pairs(n, seed, n_shots, gate, moved), frozenset(found), _idle(model, used), corrupts
    )  # fmt: skip


def programs(
    *, n_distractors: int = 2, corrupts: Corrupts | str = "tokens and places", sharpness: float = 40.0, seed: int = 0
) -> tuple[Program, ...]:
    """One of each: the test bed."""
    return (
        induction(n_distractors=n_distractors, corrupts=corrupts, sharpness=sharpness, seed=seed),
        two_back(n_distractors=n_distractors, corrupts=corrupts, sharpness=sharpness, seed=seed),
        conditional(gate="mlp", n_distractors=n_distractors, corrupts=corrupts, sharpness=sharpness, seed=seed),
        conditional(gate="q", n_distractors=n_distractors, corrupts=corrupts, sharpness=sharpness, seed=seed),
    )


def _conditional_mlp(
    n_distractors: int, n_ctx: int, sharpness: float, seed: int, moved: bool
) -> tuple[ToyTransformer, set[Edge], list[Head]]:
    size = WORDS.size
    build = Builder(
        "conditional copy, MLP", ("x", "y", "out"), n_layers=2, n_heads=2 + n_distractors, n_ctx=n_ctx, sharpness=sharpness, seed=seed, d_mlp=2 * size
    )  # fmt: skip
    x, y = build.draw_heads(2)
    build.fetch(0, x, 2, "content", "x")
    build.fetch(0, y, 1, "content", "y")
    build.imitate(0, [x, y])
    mlp, steep = cast(ToyBlock, build.model.blocks[0]).mlp, 20.0  # gelu(-10) is 0 and gelu(10) is 10 in float32
    assert mlp is not None
    with torch.no_grad():
        mlp.W_in.zero_()
        mlp.W_out.zero_()
        for k, (flag, slot) in enumerate(zip(_flags(), ("x", "y"), strict=True)):
            units = slice(k * size, (k + 1) * size)
            mlp.W_in[build.slots[slot], units] = build.eye * steep
            mlp.W_in[build.slots["content"].start + flag, units] = steep
            mlp.W_out[units, build.slots["out"]] = build.eye / (0.5 * steep)
        mlp.b_in.fill_(-1.5 * steep)
    found = set[Edge]()
    for head in (x, y):
        found |= _reads((0, head), v=[None]) | _finds((0, head), moved)
    into = Receiver("mlp", 0)
    found |= {Edge(sender, into) for sender in (Sender("embed"), Sender("head", 0, x), Sender("head", 0, y))}
    found.add(Edge(Sender("mlp", 0), Receiver("logits", 2)))
    return build.model, found, [(0, x), (0, y)]


def _conditional_q(
    n_distractors: int, n_ctx: int, sharpness: float, seed: int, moved: bool
) -> tuple[ToyTransformer, set[Edge], list[Head]]:
    build = Builder(
        "conditional copy, queries", ("mode", "out"), n_layers=2, n_heads=2 + n_distractors, n_ctx=n_ctx, sharpness=sharpness, seed=seed
    )
    (flag,), (x, y) = build.draw_heads(1), build.draw_heads(2)
    build.fetch(0, flag, n_ctx - 1, "content", "mode")  # the last place reads the first one
    build.fetch_if(1, x, 2, _flags()[0], "mode", "out")
    build.fetch_if(1, y, 1, _flags()[1], "mode", "out")
    build.imitate(0, [flag])
    build.imitate(1, [x, y])
    found = _reads((0, flag), v=[None])
    # the first token keeps its place, so the keys that this head looks for stay: only its queries carry places
    found |= {edge for edge in _finds((0, flag), moved) if edge.receiver.kind == "q"}
    for head in (x, y):
        found |= _reads((1, head), q=[(0, flag)], v=[None]) | _finds((1, head), moved) | _answers(build.model, [(1, head)])
    return build.model, found, [(0, flag), (1, x), (1, y)]


def _flags() -> tuple[int, int]:
    """Token ids of the two flags, i0 and i1."""
    return FIRST_LABEL - WORDS.n_items, FIRST_LABEL - WORDS.n_items + 1


def _reads(head: Head, **sources: Iterable[Head | None]) -> set[Edge]:
    """Edges into a head's q, k and v from other heads, or from the embeddings (None)."""
    return {
        Edge(Sender("embed") if source is None else Sender("head", *source), Receiver(kind, *head))  # type: ignore[arg-type]
        for kind, some in sources.items()
        for source in some
    }


def _finds(head: Head, moved: bool) -> set[Edge]:
    """Edges by which a head knows places; they carry something only where the corrupt prompts move tokens."""
    return _reads(head, q=[None], k=[None]) if moved else set()


def _answers(model: ToyTransformer, heads: Iterable[Head]) -> set[Edge]:
    """Edges from heads to the logits."""
    return {Edge(Sender("head", *head), Receiver("logits", model.cfg.n_layers)) for head in heads}


def _idle(model: ToyTransformer, used: list[Head]) -> tuple[Head, ...]:
    return tuple((layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads) if (layer, head) not in used)


def _order(model: ToyTransformer) -> tuple[Sender, ...]:
    return senders(model.cfg.n_layers, model.cfg.n_heads, mlps=not model.cfg.attn_only)


@torch.no_grad()
def _imitate(model: ToyTransformer, heads: tuple[Head, ...]) -> None:
    """Every other idle head of the layer of `heads` attends and reads as they do; it keeps writing into room."""
    attn = cast(ToyBlock, model.blocks[heads[0][0]]).attn
    used = [head for _, head in heads]
    for k, head in enumerate([head for head in range(model.cfg.n_heads) if head not in used][::2]):
        for weight in (attn.W_Q, attn.W_K, attn.W_V):
            weight[head] = weight[used[k % len(used)]]


def _check(n_distractors: int, corrupts: str, n_tokens: int = 8) -> bool:
    """Whether the corrupt prompts move tokens, after the refusals."""
    if n_distractors < 0:
        raise OptionError(f"n_distractors must be at least 0; got {n_distractors}. Choose how many idle heads a layer has.")
    if corrupts not in ("tokens and places", "tokens"):
        raise OptionError(f'corrupts must be "tokens and places" or "tokens"; got {corrupts!r}. Choose one.')
    if not 4 <= n_tokens <= WORDS.n_labels:
        raise OptionError(f"n_tokens must be 4..{WORDS.n_labels}; got {n_tokens}. Choose the length of the prompts.")
    return corrupts == "tokens and places"
