"""Notebooks 12 and 13: induction heads against function-vector heads in the bundled model, and the same head scores and knock-outs in nnsight."""

from __future__ import annotations

ODDS_SETUP = """>>>
import os
import shutil
import tempfile
from pathlib import Path

import mechicl
from mechicl import plot
from mechicl.studies import heads_at_odds

figures = Path(os.environ.get("MECHICL_FIGURES", "../figures"))
kept = Path(tempfile.mkdtemp()) / "odds"
model = mechicl.load("demo")"""

ODDS = [
    """
# Induction heads or function-vector heads?

Huang et al. (2026) find that induction heads drive multimodal in-context learning. Yin and Steinhardt (2025) find, in twelve language models, that few-shot accuracy hangs on **function-vector heads** (Todd et al. 2024), most of all in
larger models, and that switching off induction heads costs little once the heads that are both are left in. Both are answers of knock-outs; here is the same question to the bundled model: both kinds, equal doses, each also with the other's
top heads left in, beside as many random heads. One model, one training, one seed.""",
    """
## The study

Three tasks (concepts, real digits, made-up words), 1, 2 and 4 examples of each of 4 classes. A function vector can only say what the prompts of a task share, so the classes and names of a *function* are fixed over its episodes; heads are ranked
on four functions of each task and switched off on four others. Every finished part is kept in `results/heads_at_odds` (about 20 minutes on two busy cores); this cell only puts them together. Take away the copying and it runs anew:
`mechicl study heads-at-odds --batch-size 24 --out runs/odds`.""",
    """>>>
shutil.copytree("results/heads_at_odds", kept)
print(heads_at_odds.cost(model, timed=False))
result = heads_at_odds.run(model, n=24, batch_size=24, out=kept, progress=False)
for s in result.settings:
    print(f"{s.task}, {s.shots} shots: intact {s.accuracy}, zero-shot {s.zero_shot.value:.2f}, chance {s.chance:.2f}")""",
    """
## Two scores, two rankings

Induction: attention from the query to right minus wrong labels, against shuffled labels. Function vector: what a head's mean output over clean prompts adds to the right label's probability in prompts whose labels are shuffled, against its mean over shuffled
prompts. Whether a head *is* one, is whether it passes its null; whether the rankings agree, is compared with chance.""",
    """>>>
heads = result.heads_frame().sort_values("induction", ascending=False)
print(heads.round(4).head(6).to_string(index=False))
print(heads.sort_values("function_vector", ascending=False).round(4).head(6).to_string(index=False))
print({kind: len(some) for kind, some in result.passing.items()}, "heads pass their null")
overlap = result.overlaps[result.main_dose]
print(f"top {overlap.k}: {len(overlap.shared)} shared, {overlap.expected:.1f} by chance, p = {overlap.p:.2g}; rank correlation {overlap.spearman:.2f}")""",
    """
## Switched off

Mean ablation (as Yin and Steinhardt) and zero (as Huang et al.), all settings together; *excluded*: the top of the other ranking was taken out of this one first, so it stays in the model. p: McNemar, Holm over these rows; random: as many other heads.""",
    """>>>
frame = result.to_frame()
columns = ["how", "kind", "excluded", "k", "change", "change_low", "change_high", "p_corrected", "random_change", "p_random", "finding"]
print(frame[frame.task == "all"][columns].round(3).to_string(index=False))""",
    """>>>
contrasts = result.contrasts_frame()
together = contrasts[(contrasts.task == "all") & (contrasts.dose == result.main_dose)]
print(together[["how", "excluded", "k", "difference", "low", "high", "p_corrected", "n"]].round(4).to_string(index=False))
figure = plot(result)
figure.write_html(figures / "12_heads_at_odds.html", include_plotlyjs="directory")
figure""",
    """
## Verdict

By rule, not by eye.""",
    """>>>
print(result.rule)
print()
print(result.verdict)
for note in result.notes:
    print(note)
row = result.row("induction", excluded=True)
assert row.change.high < row.random_low""",
]

NNSIGHT_SETUP = """>>>
import os
from pathlib import Path

import torch

import mechicl
from mechicl.data import concepts
from mechicl.errors import OptionError
from mechicl.models.trace import attention_path, o_proj_path, path_of

figures = Path(os.environ.get("MECHICL_FIGURES", "../figures"))
model = mechicl.load("demo")"""

NNSIGHT = [
    """
# Is it the same in nnsight?

`model.trace(batch)` opens nnsight on the Hugging Face model below mechicl, with the prompt that mechicl rendered. Head scores and knock-outs written there by hand must be mechicl's, number for number: the two paths share no code but the model.""",
    """
## Head scores

transformers' eager attention hands out its pattern as the attention module's second output; mechicl's come from its registered attention function.""",
    """>>>
batch = model.render(concepts.draw(16, classes=4, shots=1, size=28, seed=3, syllables=(2, 2)))
before = model.hf.config._attn_implementation
model.hf.set_attn_implementation("eager")
with torch.no_grad(), model.trace(batch):
    patterns = [model.nnsight.get(attention_path(model, layer)).output[1] for layer in range(model.cfg.n_layers)].save()
model.hf.set_attn_implementation(before)
print([tuple(pattern.shape) for pattern in patterns])""",
    """>>>
right, wrong = batch.mask("label", right=True), batch.mask("label", right=False)
last = torch.stack([pattern[torch.arange(batch.n), :, batch.query_pos] for pattern in patterns], 1)  # [batch, layer, head, src]
right_mass, wrong_mass = ((last * labels[:, None, None]).sum(-1) for labels in (right, wrong))
traced = (right_mass - wrong_mass / 3).mean(0)  # one right exemplar, three wrong ones
ours = mechicl.score_heads(model, batch, scores=("induction_label",), progress=False)["induction_label"]
print("largest difference over all heads:", float((torch.tensor(ours.value) - traced).abs().max()))
print("top heads:", ours.top(4))""",
    """
## Knock-out

Head h of a layer is columns h * d_head to (h + 1) * d_head of what enters the output projection. The whole set at once; then the same with a random set of as many heads, the control.""",
    """>>>
width, unembed = model.cfg.d_head, path_of(model.hf, model.anatomy.unembed)
paths = {layer: o_proj_path(model, layer) for layer in range(model.cfg.n_layers)}
chosen = sorted(ours.top(4))
with torch.no_grad(), model.trace(batch):
    for layer in sorted({layer for layer, _ in chosen}):
        z = model.nnsight.get(paths[layer]).input.clone()
        for head in [head for at, head in chosen if at == layer]:
            z[..., head * width : (head + 1) * width] = 0.0
        model.nnsight.get(paths[layer]).input = z
    logits = model.nnsight.get(unembed).output.save()""",
    """>>>
proof = mechicl.ablate(model, batch, chosen, singles=False, n_random=20, score="first_token", progress=False)
scores = logits[torch.arange(batch.n), batch.query_pos].log_softmax(-1)
labels = torch.tensor([[ids[0] for ids in row] for row in batch.candidate_ids])
found = scores.gather(1, labels)
answers = torch.tensor(batch.answers)[:, None]
margins = found.gather(1, answers)[:, 0] - found.scatter(1, answers, -torch.inf).amax(1)
print("margins, nnsight and mechicl:", margins[:4].tolist(), proof.chosen.margins[:4].tolist())
print("intact", proof.intact.accuracy, "off", proof.chosen.accuracy, "random heads off", proof.random_mean)""",
    """
## On a server

For a model loaded by its hub id, and with nnsight's key, `with model.trace(batch, remote=True):` sends the same block to nnsight's server; read through `model.remote` instead of `model.nnsight`. The bundled model is on no server, and mechicl says so before anything is sent.""",
    """>>>
try:
    model.trace(batch, remote=True)
except OptionError as error:
    print(error)
figure = mechicl.plot(ours)
figure.write_html(figures / "13_head_scores.html", include_plotlyjs="directory")
figure""",
    """
## Verdict""",
    """>>>
assert (torch.tensor(ours.value) - traced).abs().max() < 1e-5
assert (torch.tensor(proof.chosen.margins) - margins).abs().max() < 1e-3
print("the same in nnsight: scores to 1e-5, margins of the knock-out to 1e-3 nats; n =", batch.n, "prompts")""",
]
