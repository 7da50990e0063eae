"""Hand-made results to draw: a small circuit (two label-to-image heads, four redundant induction heads) with plausible intervals."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
from PIL import Image

from mechicl.results import (
    Ablation,
    AblationCell,
    DoseCurve,
    Estimate,
    Head,
    HeadScores,
    HeadSet,
    ICLAccuracy,
    PromptView,
    Provenance,
    RoleAttention,
    Score,
    Series,
    Study,
)

PROVENANCE = Provenance(
    "demo",
    "0123abc",
    "float32",
    "mechicl (rows), sdpa",
    "cpu",
    "concepts",
    0,
    {"mechicl": "0.1.0", "torch": "2.15.0"},
    {"classes": 4, "shots": 2},
)
INDUCTION: tuple[Head, ...] = ((1, 0), (1, 1), (1, 2), (1, 3))
ILA: tuple[Head, ...] = ((0, 1), (0, 2))
PREVIOUS: tuple[Head, ...] = ((0, 3),)


def estimate(value: float, n: int = 64, unit: str = "probability") -> Estimate:
    half = 1.96 * np.sqrt(max(value * (1 - value), 0.004) / n) if unit == "probability" else 0.3
    low, high = (max(0.0, value - half), min(1.0, value + half)) if unit == "probability" else (value - half, value + half)
    return Estimate(float(value), float(low), float(high), n, unit)


def score(name: str, heads: tuple[Head, ...], shape: tuple[int, int] = (3, 4), n: int = 64, seed: int = 0, high: float = 0.8) -> Score:
    rng = np.random.default_rng(seed)
    value = rng.normal(0.01, 0.012, shape)
    for k, head in enumerate(heads):
        value[head] = high - 0.06 * k
    per = value + rng.normal(0, 0.05, (n, *shape))
    value = per.mean(0)
    p = np.where(value > 0.1, 1e-6, rng.uniform(0.1, 1, shape))
    return Score(
        name, f"what {name} means", "probability", value, value - 0.02, value + 0.02, np.full(shape, 0.005), np.full(shape, 0.05), p,
        np.minimum(1, p * p.size), per, "Huang et al. 2026",
    )  # fmt: skip


def head_scores(shape: tuple[int, int] = (3, 4), n_kv: int = 2) -> HeadScores:
    scores = {
        "induction": score("induction", INDUCTION, shape, seed=1),
        "ila": score("ila", ILA, shape, seed=2, high=0.97),
        "previous_token": score("previous_token", PREVIOUS, shape, seed=3, high=0.9),
        "tila": score("tila", INDUCTION, shape, seed=4, high=0.4),
        "sink": score("sink", ((2, 0), (2, 3)), shape, seed=5, high=0.6),
    }
    return HeadScores(scores, 64, n_kv, (), PROVENANCE)


def accuracy(share: float = 0.97, n: int = 64, zero: float | None = 0.26, seed: int = 0) -> ICLAccuracy:
    rng = np.random.default_rng(seed)
    correct = rng.random(n) < share
    margins = np.where(correct, rng.gamma(4, 1.2, n), -rng.gamma(1.5, 1, n))
    names = tuple(("bato", "kilu", "remo", "fasi") for _ in range(n))
    answers = rng.integers(0, 4, n)
    predicted = np.where(correct, answers, (answers + 1) % 4)
    return ICLAccuracy(
        estimate(float(correct.mean()), n), estimate(float(correct.mean()), n), estimate(float(correct.mean()) * 0.98, n), estimate(1.0, n),
        estimate(float(margins.mean()), n, "nats"), 0.25, None if zero is None else estimate(zero, n), correct, correct, correct, margins, predicted, answers, names,
        tuple(f"e{i}" for i in range(n)), n, (), PROVENANCE,
    )  # fmt: skip


def cell(heads: tuple[Head, ...], share: float, intact: ICLAccuracy, name: str = "") -> AblationCell:
    n = intact.n
    correct = np.arange(n) < round(share * n)
    after = estimate(float(correct.mean()), n)
    drop = after.value - intact.accuracy.value
    return AblationCell(
        heads, after, Estimate(drop, drop - 0.06, drop + 0.06, n, method="paired bootstrap 95 %"), Estimate(drop * 8, drop * 8 - 0.5, drop * 8 + 0.5, n, "nats"),
        1e-9 if drop < -0.1 else 0.6, correct, intact.margins + drop * 8, name,
    )  # fmt: skip


def ablation(heads: tuple[Head, ...] = INDUCTION, after: float = 0.02, singles: float = 0.97, draws: int = 20) -> Ablation:
    intact = accuracy()
    rng = np.random.default_rng(3)
    random = tuple(cell(((2, 0), (2, 1), (2, 2), (0, 0)), float(np.clip(rng.normal(0.93, 0.04), 0, 1)), intact) for _ in range(draws))
    alone = tuple(cell((h,), singles, intact) for h in heads) if len(heads) > 1 else ()
    mean = float(np.mean([c.accuracy.value for c in random]))
    return Ablation(
        "mean", intact, cell(heads, after, intact), alone, random, Estimate(mean, mean - 0.03, mean + 0.03, 64), 1 / (draws + 1), estimate(0.26),
        "random heads from the nearest layers: layer 1 has no heads left", "The set is necessary; its heads are redundant.", 64, PROVENANCE,
    )  # fmt: skip


def dose(k: int = 8) -> DoseCurve:
    ranking = (*INDUCTION, (0, 1), (0, 2), (0, 3), (2, 0), (2, 1), (2, 2), (2, 3), (0, 0))[:k]
    values = [0.97, 0.97, 0.95, 0.8, 0.02, 0.01, 0.0, 0.02, 0.0, 0.0, 0.0, 0.0, 0.0][: k + 1]
    mean = np.linspace(0.97, 0.7, k + 1)
    return DoseCurve(
        ranking, "induction", np.arange(k + 1), tuple(estimate(v) for v in values), tuple(estimate(8 * v - 2, unit="nats") for v in values), mean, mean - 0.1,
        np.minimum(mean + 0.05, 1), 20, 0.25, "mean", 64, PROVENANCE,
    )  # fmt: skip


def roles(shape: tuple[int, int] = (3, 4)) -> RoleAttention:
    spans = ("right label", "wrong label", "right image", "wrong image", "query image", "question", "instruction", "glue", "sink")
    value = np.random.default_rng(0).dirichlet(np.full(len(spans), 0.5), shape)
    return RoleAttention(spans, value, np.clip(value - 0.02, 0, 1), np.clip(value + 0.02, 0, 1), 64, PROVENANCE)


def series() -> Series:
    steps = np.arange(0, 2001, 100)
    sig = lambda at, w=60.0: 1 / (1 + np.exp(-(steps - at) / w))  # noqa: E731
    values = {"accuracy": 0.25 + 0.72 * sig(900), "induction": 0.9 * sig(600), "ila": 0.98 * sig(850)}
    return Series(
        steps, values, {"accuracy": values["accuracy"] - 0.05}, {"accuracy": np.minimum(values["accuracy"] + 0.05, 1)}, "probability", 256, PROVENANCE,
        ((0, "repeated tokens"), (600, "words"), (1000, "pictures")),
    )  # fmt: skip


def picture(seed: int, size: int = 28) -> bytes:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    art = np.stack([np.sin(9 * x * rng.random() + 9 * y * rng.random() + c) * 100 + 128 for c in range(3)], -1).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(art).save(out, "PNG")
    return out.getvalue()


def prompt(words: tuple[str, ...] = ("bato", "kilu", "bato", "kilu"), answer: str = "bato", per_image: int = 4) -> PromptView:
    """A chat prompt: instruction, `words` as labels of one picture each, then the query. The induction heads look from the end at the right labels."""
    tokens: list[str] = ["<s>", "Name", " the", " thing", "."]
    roles, shots, labels = ["glue"] + ["instruction"] * 4, [-2] * 5, [""] * 5
    boxes = []
    for k, label in enumerate([*words, answer]):
        shot = k if k < len(words) else -1
        side, box = round(per_image**0.5), {}
        tokens.append("\nuser: ")
        roles.append("glue")
        for i in range(per_image):
            box[len(tokens)] = (28 * (i % side) / side, 28 * (i // side) / side, 28 * (i % side + 1) / side, 28 * (i // side + 1) / side)
            tokens.append("<image>")
            roles.append("image")
        boxes.append(box)
        tokens += ["This", " is", " a"]
        roles += ["question"] * 3
        if shot >= 0:
            half = len(label) // 2
            tokens += [" " + label[:half], label[half:], "\n"]
            roles += ["label", "label", "glue"]
        shots += [shot] * (len(tokens) - len(shots))
        labels += [label] * (len(tokens) - len(labels))
    n = len(tokens)
    patterns = {}
    rng = np.random.default_rng(0)
    for head in (*INDUCTION, *ILA):
        raw = np.tril(rng.random((n, n)) ** 3 + 0.02)
        if head in INDUCTION:
            raw[-1, [i for i in range(n) if roles[i] == "label" and labels[i] == answer]] += 25
        patterns[head] = raw / raw.sum(-1, keepdims=True)
    return PromptView(
        tuple(tokens), tuple(roles), tuple(shots), tuple(labels), tuple(picture(k) for k in range(len(words) + 1)), tuple(boxes),
        {h: p[-1] for h, p in patterns.items()}, patterns, answer, answer, "episode 0", PROVENANCE,
    )  # fmt: skip


def hostile_prompt() -> PromptView:
    """A prompt whose labels and tokens try to leave their element."""
    bad = '</script><img src=x onerror="alert(1)">'
    view = prompt((bad, "kilu", bad, "kilu"), answer=bad)
    return replace(view, predicted="<b>kilu</b>", episode="<i>x</i>")


def study(*, holds: bool = True) -> Study:
    """A whole story that holds (redundant induction heads, necessary label-to-image heads), or one where nothing is found."""
    scores = head_scores()
    if not holds:
        flat = {key: score(key, (), seed=k) for k, key in enumerate(scores.scores)}
        sets = (HeadSet("induction", "induction", "Holm p < 0.05", (), "none", "no head passes its null."),)
        return Study(
            HeadScores(flat, 64, 2, (), PROVENANCE), HeadScores(flat, 64, 2, (), PROVENANCE), accuracy(0.27), {"labels permuted": estimate(0.25)}, sets, roles(),
            (prompt(),), None, 64, 64, PROVENANCE,
        )  # fmt: skip
    rule = "Holm p < 0.05 and a score of at least 0.1"
    sets = (
        HeadSet(
            "induction",
            "induction",
            rule,
            INDUCTION,
            "redundant",
            "The set is needed; each head of it alone can be spared: redundant, not irrelevant.",
            ablation(),
            dose(),
        ),
        HeadSet("label-to-image", "ila", rule, ILA, "necessary", "The set is needed.", ablation(ILA, 0.24, 0.7), None),
        HeadSet(
            "previous-token",
            "previous_token",
            rule,
            PREVIOUS,
            "irrelevant",
            "Off, it costs nothing that random heads do not cost.",
            ablation(PREVIOUS, 0.96),
            None,
        ),
    )
    return Study(
        scores, head_scores(), accuracy(), {"labels permuted": estimate(0.23)}, sets, roles(), (prompt(), prompt(answer="kilu", per_image=16)), series(), 64, 64, PROVENANCE,
        effects=replace(score("margin_lost", ((0, 1), (0, 2)), seed=7, high=2.5), unit="nats", null_name="no loss, paired over prompts"),
    )  # fmt: skip
