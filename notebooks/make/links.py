"""Notebook 11: did contrastive training build the link, or sharpen one that was there?"""

from __future__ import annotations

SETUP = """>>>
import os
from pathlib import Path

import pandas as pd

import mechicl
from mechicl import plot
from mechicl.analysis.trainings.bands import runs_estimate
from mechicl.data.link_context import SHORT, generated_pool, link_episodes

figures = Path(os.environ.get("MECHICL_FIGURES", "../figures"))
results = Path(os.environ.get("MECHICL_RESULTS", "results"))"""

LINK = [
    """
# Does contrastive training build the link, or sharpen one that was there?

Tai et al. (2023) fine-tune a model on episodes in which a picture class gets a new name beside a hard negative, and say that it then follows the *link* between pictures and names. Which heads do that, and did they do it before? The base here learned
repeated sequences, then to name forty classes by names that never change: **no prompt of its training gave a picture a new name**. 24 fine-tunings start from it (four strategies, hard or random negatives, three seeds each, 200 steps of 16 episodes; `python -m benchmarks.link`).
Everything is asked about concepts that no training showed.""",
    """
## One fine-tuning, live

The base and one of the 24 (2-way-random, hard negatives, seed 0; both stored in bfloat16). Heads are found on one half of the episodes: a head carries the link when its output alone, taken from the twin prompt whose examples exchanged their *pictures*, takes the answer along. Scores, and
exchanges of weights, are measured on the other half.""",
    """>>>
base, tuned = (mechicl.load(results / name, dtype="float32") for name in ("link_base", "link_tuned"))
pool = generated_pool(1, 10, 16, 28, split="held_out", names="made-up")
episodes = link_episodes(pool, 48, shots=2, prompt=SHORT, seed=131)
one = mechicl.build_or_sharpen(base, {"2-way-random": tuned}, episodes, metric="logit_diff", parts=False, batch_size=24, progress=False)
print(f"base {one.base_accuracy}, fine-tuned {one.rows[0].accuracy}, chance {one.chance}")
print(one.rows[0].verdict)
plot(one)""",
    """>>>
columns = ["layer", "head", "role_base", "role", "was", "base", "base_low", "base_high", "adapted", "adapted_low", "adapted_high", "carried_adapted"]
one.heads_frame()[columns].round(2)""",
    """
## All 24: what were the link heads before?

The same comparison for every fine-tuning (`python -m benchmarks.link_circuit`, n = 48 episodes to find heads and 48 to measure). Which of them learned a link at all? Below, *training* is the unit: intervals are Student's over trainings.""",
    """>>>
models, heads, grafts, prior = (pd.read_parquet(results / f"11_link_{name}.parquet") for name in ("models", "heads", "grafts", "prior"))
split = models["model"].str.split(expand=True)
models = models.assign(strategy=split[0], negatives=split[1], seed=split[2].astype(int))
linked = models[models["finding"] != "no link"]
print(f"{len(linked)} of {len(models)} trainings show a link; base accuracy {models['base_accuracy'].iloc[0]:.2f}")
models.groupby(["strategy", "negatives"], sort=False).agg(accuracy=("accuracy", "mean"), linked=("finding", lambda x: (x != "no link").sum()), of=("model", "size")).round(2)""",
    """>>>
heads = heads[heads["model"].isin(linked["model"])]
print(heads.groupby(["layer", "head"]).size().sort_values(ascending=False).head(8).to_dict(), "of", len(linked), "link circuits")
print(heads.groupby(["role", "role_base", "was"]).size().to_string())
score = {}
for role in ("matching", "gathering", "previous-token"):
    some = heads[heads["role"] == role].groupby("model")[["base", "adapted"]].mean()
    score[role] = {side: runs_estimate(some[side].to_numpy(), unit="share of attention") for side in ("base", "adapted")}
    print(f"{role}: in the base {score[role]['base']}, now {score[role]['adapted']} (n: trainings)")""",
    """
## Whose weights does it need?

The base's weights are put back at some heads of the fine-tuned model (needed?), and the fine-tuned ones into the base (enough?), beside as many random heads. The number is the change of the margin between the right name and the wrong one, in nats.""",
    """>>>
moved = {}
kept = grafts[grafts["model"].isin(linked["model"]) & (grafts["letters"] == "qkvo")]
for side in ("adapted", "base"):
    for what in ("link heads", "matching heads", "gathering heads", "previous-token heads", "all other heads", "attention", "mlps", "embeddings", "vision"):
        some = kept[(kept["recipient"] == side) & (kept["what"] == what)]
        if len(some):
            moved[side, what] = runs_estimate(some["margin_change"].to_numpy(), unit="nats")
            print(f"into the {side}: {what}: {moved[side, what]}; accuracy {some['accuracy'].mean():.2f}")
    random = kept[(kept["recipient"] == side) & (kept["what"] == "link heads")]["random_margin_change"]
    moved[side, "random"] = runs_estimate(random.to_numpy(), unit="nats")
    print(f"into the {side}: as many random heads: {moved[side, 'random']}")""",
    """>>>
gain = (linked["accuracy"] - linked["base_accuracy"]).to_numpy()
back = kept[(kept["recipient"] == "adapted") & (kept["what"] == "link heads")]
print(f"p of the margin beside random heads at most .05 in {(back['p_margin'] <= 0.05).sum()} of {len(back)} trainings")
print("link heads switched off (mean):", runs_estimate(linked["ablated"].to_numpy(), unit="probability"), "random:", runs_estimate(linked["ablated_random"].to_numpy(), unit="probability"))
print("gain in accuracy over the base:", runs_estimate(gain, unit="difference"))""",
    """
## The link against the prior

The forty classes that the base can name, two of them called by each other's name. log p(link's name) - log p(known name), nats: below zero the prior wins.""",
    """>>>
prior = prior.assign(strategy=prior["model"].str.split().str[0])
table = prior.groupby(["strategy", "shots"], sort=False)[["preference", "link", "prior"]].mean().round(2).unstack("shots")
print("named rightly without examples:", prior.groupby("strategy", sort=False)["known"].mean().round(2).to_dict())
table["preference"].join(table["link"].add_suffix(": called by the link's name"))""",
    """
## Verdict""",
    """>>>
new = heads[heads["role"] == "matching"]["was"].eq("new")
old = heads[heads["role"] != "matching"]
print(f"matching heads that were new: {new.sum()} of {len(new)}; other heads that had their function, at least in part: {old['was'].isin(['had it', 'in part']).sum()} of {len(old)}")
print("base's weights back at the link heads:", moved["adapted", "link heads"], "nats; at as many random heads:", moved["adapted", "random"])
print("link heads' weights in the base:", moved["base", "link heads"], "nats; all attention:", moved["base", "attention"])
figure = plot(one)
figure.write_html(figures / "11_built_or_sharpened.html", include_plotlyjs="directory")
assert new.mean() > 0.8
assert moved["adapted", "link heads"].high < moved["adapted", "random"].low""",
]
