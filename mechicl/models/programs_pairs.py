"""Prompts of the hand-made programs, in pairs that differ in every token and, where asked, in the places of the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mechicl.models.programs_parts import WORDS
from mechicl.models.toys.prompts import ToyRenderer, toy_episodes
from mechicl.prompts.batch import Batch
from mechicl.prompts.corrupt import Pairs
from mechicl.prompts.episode import Shot
from mechicl.prompts.spans import NO_SHOT, QUERY, Role, Span


def derangement(n: int, generator: torch.Generator) -> Tensor:
    """A random order of n things in which none keeps its place; n of 1 or less stays."""
    while n > 1:
        order = torch.randperm(n, generator=generator)
        if bool((order != torch.arange(n)).all()):
            return order
    return torch.arange(n)


def places(n: int, n_pos: int, generator: torch.Generator, *, moved: bool) -> Tensor:
    """Places [batch, pos]: 0, 1, 2, ...; or all but the first at a place that is not their own."""
    rows = [1 + derangement(n_pos - 1, generator) if moved else torch.arange(1, n_pos) for _ in range(n)]
    return torch.cat([torch.zeros(n, 1, dtype=torch.long), torch.stack(rows)], 1)


def token_batch(
    rows: Sequence[Sequence[str]], spans: Sequence[tuple[tuple[Role, int, int | None], ...]], answers: Sequence[str], candidates: Sequence[tuple[str, ...]],
    place: Tensor,
) -> Batch:  # fmt: skip
    """Sequences of single words as a batch without a renderer: `spans` gives role, shot and picture of every token, `place` [batch, pos] where it stands."""
    ids = torch.tensor([WORDS.encode(" ".join(row)) for row in rows])
    named = tuple(
        tuple(
            Span(role, t, t + 1, shot, image, label=answer if shot == QUERY else row[t], item=row[t])
            for t, (role, shot, image) in enumerate(kinds)
        )
        for row, kinds, answer in zip(rows, spans, answers, strict=True)
    )
    return Batch(
        inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": place}, spans=named,
        answers=tuple(names.index(answer) for names, answer in zip(candidates, answers, strict=True)), candidates=tuple(candidates),
        candidate_ids=tuple(tuple(tuple(WORDS.encode(word)) for word in names) for names in candidates), patches=tuple(() for _ in rows),
        ids=tuple(str(k) for k in range(len(rows))),
    )  # fmt: skip


def symbols(n: int, width: int, generator: torch.Generator) -> Iterator[tuple[list[str], list[str], tuple[str, ...]]]:
    """n times: `width` different words, the same words with none in its place, and the words in the order of candidates."""
    for _ in range(n):
        words = [f"l{int(k)}" for k in torch.randperm(WORDS.n_labels, generator=generator)[:width]]
        other = [words[int(k)] for k in derangement(width, generator)]
        yield words, other, tuple(words[int(k)] for k in torch.randperm(width, generator=generator))


def made_pairs(clean: Batch, corrupt: Batch, moved: bool) -> Pairs:
    """Pairs, with what differs."""
    return Pairs(clean, corrupt, "every token and every place but the first" if moved else "every token", ())


def _crossed(width: int, generator: torch.Generator) -> Iterator[tuple[list[str], list[str], tuple[str, ...]]]:
    """As `symbols`, without end, where the last two words do not change places: else the other flag would ask for the same word."""
    while True:
        for words, other, names in symbols(1, width, generator):
            if words[-1] != other[-2] and words[-2] != other[-1]:
                yield words, other, names


def induction_pairs(n: int, seed: int, moved: bool, classes: int = 4) -> Pairs:
    """Items and labels are dealt out anew to all places; the query shows another item."""
    generator = torch.Generator().manual_seed(seed)
    episodes = toy_episodes(n, classes=classes, shots=1, generator=generator)
    others = []
    for episode in episodes:
        shots, asked = episode.shots, [shot.text for shot in episode.shots].index(episode.query.text)
        # place k shows the item of k + 1 and the label of k + 2: no token stays, and every item has another label
        new = tuple(
            replace(shots[(k + 2) % classes], text=shots[(k + 1) % classes].text, item=shots[(k + 1) % classes].item)
            for k in range(classes)
        )
        query = Shot(
            label=shots[(asked + 2) % classes].label, text=shots[(asked + 1) % classes].text, item=shots[(asked + 1) % classes].item
        )
        others.append(replace(episode, shots=new, query=query))
    renderer = ToyRenderer()
    sides = []
    for some, there in ((episodes, False), (others, moved)):
        batch = renderer.render(some)
        # without a renderer a batch is taken apart row by row, places included
        place = places(batch.n, batch.n_pos, generator, moved=there)
        sides.append(replace(batch, inputs={**batch.inputs, "position_ids": place}, renderer=None))
    return made_pairs(sides[0], sides[1], moved)


def two_back_pairs(n: int, seed: int, n_tokens: int, moved: bool) -> Pairs:
    """No token keeps its place."""
    generator = torch.Generator().manual_seed(seed)
    drawn = list(symbols(n, n_tokens, generator))
    kinds: tuple[tuple[Role, int, None], ...] = (*(("label", t, None) for t in range(n_tokens - 1)), ("text", QUERY, None))  # type: ignore[assignment]
    names = [candidates for _, _, candidates in drawn]
    sides = [
        token_batch(rows, [kinds] * n, [row[-3] for row in rows], names, places(n, n_tokens, generator, moved=there))
        for rows, there in (([clean for clean, _, _ in drawn], False), ([corrupt for _, corrupt, _ in drawn], moved))
    ]
    return made_pairs(sides[0], sides[1], moved)


def conditional_pairs(n: int, seed: int, n_shots: int, gate: str, moved: bool) -> Pairs:
    """No x or y keeps its place, and the flag is the other one."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [next(_crossed(2 * n_shots, generator)) for _ in range(n)]
    # as many prompts for x as for y, in random order; the corrupt prompt asks for the other one
    flags = [int(k) % 2 for k in torch.randperm(n, generator=generator)]
    pairs: list[tuple[Role, int, int | None]] = [
        (role, k, k if role == "image" else None) for k in range(n_shots) for role in ("text", "image")
    ]  # type: ignore[misc]
    kinds = (*pairs, ("question", QUERY, None)) if gate == "mlp" else (("instruction", NO_SHOT, None), *pairs, ("question", QUERY, None))
    sides = []
    for side, there in ((0, False), (1, moved)):
        rows, answers = [], []
        for one, flag in zip(drawn, flags, strict=True):
            words, asked = one[side], (flag + side) % 2
            rows.append([*words, f"i{asked}"] if gate == "mlp" else [f"i{asked}", *words, "i2"])
            answers.append(words[-2 + asked])
        place = places(n, len(kinds), generator, moved=there)
        sides.append(token_batch(rows, [kinds] * n, answers, [one[2] for one in drawn], place))  # type: ignore[list-item]
    return made_pairs(sides[0], sides[1], moved)
