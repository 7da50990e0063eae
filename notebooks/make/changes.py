"""Notebook 10: what an example changes in the keys and values of the query."""

from __future__ import annotations

SETUP = """>>>
import os
from pathlib import Path

import mechicl
from mechicl import plot
from mechicl.data import concepts, digits

figures = Path(os.environ.get("MECHICL_FIGURES", "../figures"))
model = mechicl.load("demo")
names = {"syllables": (2, 2), "size": 28}"""

CHANGE = [
    """
# What does an example change?

Miyanishi and Nguyen (2024) hold that examples work by moving the keys and values of the query: examples like the query move them more, meaning matters on hard tasks and form on established ones. Their formulas and their prompt
could not be read here: **the definitions below are mechicl's own** (docs/kv_shift.md, docs/factors.md, docs/margin.md). Everything is about the bundled model, one training, one seed.""",
    """
## The shift

Keys (before their rotation) and values of the query's own tokens: with the examples, and with a neutral filler of as many tokens, against the question alone.""",
    """>>>
episodes = concepts.draw(32, classes=4, shots=1, seed=7, **names)
shift = mechicl.kv_shift(model, episodes, progress=False)
for (part, span), e in shift.test.pooled.items():
    print(f"{part}, {span}: examples minus filler {e}, p = {shift.test.pooled_p[part, span]:.2g}")
plot(shift)""",
    """
## Do examples like the query move it more?

One example in front of each query: the most similar of a pool by the model's own picture features, a random one, the least similar one; the same label and as many tokens each time.""",
    """>>>
pool = [shot for episode in concepts.draw(24, classes=4, shots=1, seed=11, **names) for shot in episode.shots]
similar = mechicl.similarity_test(model, episodes, pool, progress=False)
print("made by:", similar.embeddings)
for c in similar.comparisons:  # most similar, random, least similar
    print(f"{c.part}: {c.first} minus {c.second}: g = {c.effect}, p = {c.p_corrected:.2g}")
plot(similar)""",
    """
## Meaning or form?

The examples' meaning is broken (a picture of another class under each label), their form changed (the label before the picture), or both; the query's own turn stays as it is. Shares of what the conditions change, beside what it
costs in answers. Tasks from easy to hard.""",
    """>>>
tasks = {
    "2 classes": concepts.draw(24, classes=2, shots=1, seed=21, **names),
    "4 classes": concepts.draw(24, classes=4, shots=1, seed=22, **names),
    "8 classes": concepts.draw(24, classes=8, shots=1, seed=23, **names),
    "digits, 4 classes": digits.draw(24, classes=4, shots=1, seed=24, **names),
}
shares = {task: mechicl.factor_shares(model, some, task=task, progress=False) for task, some in tasks.items()}
for task, found in shares.items():
    print(task, {part: {source: round(e.value, 2) for source, e in row.items()} for part, row in found.pooled.items()})
plot(shares["4 classes"])""",
    """>>>
from mechicl.analysis.shift.condition_table import tabulate

table = tabulate(shares)
print(table.verdict)
plot(table)""",
    """
## Near the right exemplars?

The contrastive margin of a head: how much nearer the query's key (value) is to the right exemplar's than to the others', and the match of its query with their keys. Does it tell, prompt by prompt, which answers are right? On digits, where the model errs.""",
    """>>>
hard = digits.draw(96, classes=4, shots=2, seed=31, **names)
margin = mechicl.contrast_margin(model, hard, progress=False)
print(f"accuracy {margin.accuracy:.3f}, n = {margin.n}; the model's own certainty: AUROC {margin.confidence_auroc}")
for name, part in margin.parts.items():
    print(f"{name}: best head chosen on one half, AUROC on the other {part.held_out}, heads {part.held_out_heads}; more than attention: {part.held_out_gain}")
plot(margin)""",
    """
And is it a cause? The keys of the exemplars' labels are moved towards the query's match, or away from it (in units of the margin), beside random directions of equal length.""",
    """>>>
from mechicl.analysis.margin.causal import move_margin

moved = move_margin(model, episodes, [(3, head) for head in range(4)], progress=False)
figure = plot(moved)
figure.write_html(figures / "10_keys_moved.html", include_plotlyjs="directory")
figure""",
    """
## Verdict""",
    """>>>
frame = moved.to_frame().set_index("dose")
print("keys moved by -1:", frame.loc[-1.0, ["change", "low", "high", "control"]].round(2).to_dict())
print("meaning or form:", table.verdict)
claim = similar.comparisons[0]
print("similar examples shift keys more, measured from a filler:", "yes" if claim.effect.low > 0 else "the opposite" if claim.effect.high < 0 else "not shown", claim.effect)
print(" ".join(similar.notes))
assert frame.loc[-1.0, "high"] < frame.loc[-1.0, "control_low"]
assert shift.n == len(episodes)""",
]
