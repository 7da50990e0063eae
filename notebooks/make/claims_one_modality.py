"""Cells of the notebooks on one modality: 02, 03 and 06."""

ICL_AGAINST_WEIGHTS = [
    """
# Does a model learn from its prompt, or keep the answers in its weights?

A toy transformer reads item-label pairs and must name the label of one more item. It can find that item's class among the examples (**in-context learning**, ICL: tested on classes it has never
met) or remember every class in its weights (**in-weights**: tested on sequences whose examples tell nothing). Huang et al. (2026) report that many classes K, bursty contexts B and spread-out
classes eps favour ICL, and that class frequencies near k^-1 (alpha = 1) keep both.

The models are the **cpu preset** (Adam, a hundredth of the paper's steps), not the paper's own 300,000 steps of SGD: `mechicl train toy --preset huang2026` runs those. The table was made by
`mechicl sweep notebooks/sweeps/NAME.toml`; three seeds a setting, intervals over seeds (Student).
""",
    """>>>
table = pd.read_parquet(results / "NAME.parquet")
runs = bands.at_step(table)
base = claims.base_of(table)
print(len(runs), "models,", runs["seed"].nunique(), "seeds, last step", int(runs["step"].max()))
base""",
    """>>>
from mechicl.data.gaussian import UnimodalTask, chance

copy = {int(b): chance(UnimodalTask(B=int(b)), "ic")["context"] for b in table["B"].unique()}
copying = {"copying any label": copy[base["B"]]}
print("copying any label is right in", {b: round(c, 3) for b, c in copy.items()})""",
    """
## Look: how it grows in one setting

Above, shares of answers on fixed probe sequences; below, attention. *Above copying* is (accuracy - copy) / (1 - copy), which starts to rise where copying ends. *CLA* is the share of answers that are some label of the context: a model that copies any of them is right in about B/N, which
is the plateau. Dotted lines are change points, bars their intervals over seeds.
""",
    """>>>
one = claims.rows(table, base)
one = one.assign(accuracy_above_copying=((one["accuracy_ic"] - copy[base["B"]]) / (1 - copy[base["B"]])).clip(lower=0))
names = ["accuracy_ic", "accuracy_above_copying", "accuracy_iw", "cla_ic", "ph1_0.0", "ila_0.0", "ih_1.0", "tila_1.0"]
grown = change_points.emergence(one, names, least=0.02, direction="up")
figure = plot(bands.seed_bands(one, names, setting=", ".join(f"{k} = {v}" for k, v in base.items()), n=512), changes=grown)
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_growth.png", scale=2)
figure""",
    """>>>
print(grown.verdict)
plot(grown)""",
    """
## Measure: one setting at a time

Each figure changes one setting and keeps the others. Copying any context label is right more often with a larger B, so for B the accuracy **above copying** is what is compared.
""",
    """>>>
figure = plot_sweep(claims.around(table, "K"), "K", ["accuracy_ic", "accuracy_iw", "cla_ic"], title="More classes", levels=copying)
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_classes.png", scale=2)
figure""",
    """>>>
level = table["B"].map(copy)
table["accuracy_above_copying"] = (table["accuracy_ic"] - level) / (1 - level)
plot_sweep(claims.around(table, "B", base), "B", ["accuracy_above_copying", "accuracy_iw"], title="Burstier contexts")""",
    """>>>
plot_sweep(claims.around(table, "eps", base), "eps", ["accuracy_ic", "accuracy_iw"], log_x=False, title="Wider classes", levels=copying)""",
    """
Does a skew near alpha = 1 keep both? The *worse of both* is the smaller of ICL above copying and in-weights accuracy: copying alone counts as nothing.
""",
    """>>>
table["accuracy_of_the_worse"] = table[["accuracy_above_copying", "accuracy_iw"]].min(axis=1).clip(lower=0)
plot_sweep(claims.around(table, "alpha", base), "alpha", ["accuracy_ic", "accuracy_iw", "accuracy_of_the_worse"], log_x=False, title="Skewed class frequencies", levels=copying)""",
    """
## Control: a factorial design

One setting at a time says little where ICL is at its ceiling already. The factorial design of notebook 07 crosses the settings, most of them below the ceiling: main effects over pairs of models that differ in one setting
alone, on ICL above copying and on the **lean**, that minus in-weights accuracy.
""",
    """>>>
crossed = pd.read_parquet(results / "07_which_measure_predicts_icl.parquet")
level = crossed["B"].map({int(b): chance(UnimodalTask(B=int(b)), "ic")["context"] for b in crossed["B"].unique()})
crossed["above"] = (crossed["accuracy_ic"] - level) / (1 - level)
crossed["lean"] = crossed["above"] - crossed["accuracy_iw"]
ends = {x: (crossed[x].min().item(), crossed[x].max().item()) for x in ("K", "B", "eps", "alpha")}
effects = [claims.claim(f"{x} {a:g} to {b:g} raises {y}", claims.paired(crossed, y, x, a, b)) for x, (a, b) in ends.items() for y in ("above", "lean")]
claims.verdict_table(effects).round(3)""",
    """
## Verdict, from the numbers

Each effect is made within a seed; the finding is "holds" where its whole interval is above zero, "does not hold" where it is below, "not shown" else.
""",
    """>>>
along = {x: claims.around(table, x, base) for x in ("K", "B", "eps", "alpha")}
found = [
    claims.claim("more classes favour ICL", claims.slope(along["K"], "K", "accuracy_ic")),
    claims.claim("more classes weaken in-weights answers", claims.slope(along["K"].assign(neg=-table["accuracy_iw"]), "K", "neg")),
    claims.claim("burstiness favours ICL beyond copying", claims.slope(along["B"], "B", "accuracy_above_copying")),
    claims.claim("wider classes favour ICL", claims.slope(along["eps"], "eps", "accuracy_ic", log=False)),
    claims.claim("alpha = 1 keeps both better than alpha = 0", claims.difference(along["alpha"], "accuracy_of_the_worse", {"alpha": 0.0}, {"alpha": 1.0})),
]
print(*found, sep="\\n")""",
    """>>>
claims.verdict_table(found).round(3)""",
    """
## Live: two short trainings

Few and many classes side by side for a few seconds. With many the model stands on the plateau of copying any label (CLA near 1, right in about half); with few the weights know the answers and the context is hardly used (CLA
low). One seed: a look, no claim.
""",
    """>>>
from mechicl.training.toys.train import train_many
from mechicl.training.toys.recipe import recipe

both = train_many([recipe("cpu", K=k, steps=150, points=6, probe_n=256) for k in (64, 8192)], progress=False)
live = pd.concat([run.table.tail(1).assign(K=run.recipe.task.K) for run in both])
live[["K", "step", "loss", "accuracy_ic", "accuracy_iw", "cla_ic"]].round(3)""",
    """
## Recap

The table above says which of the paper's trends these models show, at which size and with how many seeds. A trend that is "not shown" is not refuted: three seeds see large effects only.
""",
    """>>>
few, many = live[live["K"] == 64].iloc[0], live[live["K"] == 8192].iloc[0]
assert many["cla_ic"] > 0.8  # answers with labels of the context
assert few["accuracy_iw"] > many["accuracy_iw"]""",
]

ROPE = [
    """
# Does RoPE raise the number of classes at which in-context learning appears?

Huang et al. (2026) say so. Two things stood in the way: the released code's map is not a rotation, and its models with one-hot places were twice as wide (129 against 64). Here every way of coding
positions has the **same width**: coordinates are kept for the place whether they are used or not. A correct RoPE, the released map, one-hot places, ALiBi and no code at all are trained on a growing number of
classes K; then RoPE with biases of queries, keys and values, and as the paper ran it.

The models are the **cpu preset** (Adam, few steps), not the paper's 300,000 steps of SGD. Table: `mechicl sweep notebooks/sweeps/NAME.toml`; three seeds, intervals over seeds (Student).
""",
    """
## Look: what the released map does to a score

A score between a fixed query and a fixed key should depend on their offset alone. How much of its variance over places does not?
""",
    """>>>
import torch

from mechicl.models.toys.positions import offset_share, rotate, rotate_interleaved_bug

made = torch.Generator().manual_seed(0)
q, k = (torch.randn(200, 1, 1, 64, generator=made).expand(-1, 33, -1, -1) for _ in range(2))
place = torch.arange(33).expand(200, -1)
shares = {f.__name__: offset_share(torch.einsum("bqhd,bkhd->bqk", f(q, place), f(k, place))) for f in (rotate, rotate_interleaved_bug)}
{name: round(share, 3) for name, share in shares.items()}""",
    """
## Measure: every code at equal width
""",
    """>>>
from mechicl.data.gaussian import chance
from mechicl.training.toys.recipe import recipe

table = pd.read_parquet(results / "NAME.parquet")
wide = claims.rows(table, {"n_places": 32, "qkv_bias": False})
copying = {"copying any label": chance(recipe("cpu").task, "ic")["context"]}
level = copying["copying any label"]
wide = wide.assign(accuracy_above_copying=((wide["accuracy_ic"] - level) / (1 - level)).clip(lower=0))
runs = bands.at_step(table)
print(len(runs), "models,", runs["seed"].nunique(), "seeds, last step", int(runs["step"].max()))
""",
    """>>>
figure = plot_sweep(wide, "K", "accuracy_ic", color="positions", title="ICL over classes, all codes of positions at equal width", levels=copying)
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_icl.png", scale=2)
figure""",
    """>>>
plot_sweep(wide, "K", "accuracy_iw", color="positions", title="The same models: answers from the weights")""",
    """
The K at which ICL first passes 75 %, by seed (interpolated between the K that were trained; 0: below all of them, inf: above). Copying any label would be right in about half, so this is well above
copying.
""",
    """>>>
codes = list(wide["positions"].unique())
at = pd.DataFrame({code: claims.threshold(claims.rows(wide, {"positions": code}), "K", "accuracy_ic", 0.75) for code in codes})
at.round(0)""",
    """
## Control: biases, and the paper's own width

Without biases of queries and keys a model without any code of positions cannot prefer one place to another; and RoPE turns what little there is. Do biases change the order? Does the width?
""",
    """>>>
same = {"K": int(claims.rows(table, {"qkv_bias": True})["K"].min()), "n_places": 32}
plot_sweep(claims.rows(table, same), "positions", "accuracy_ic", color="qkv_bias", title=f"With and without q/k/v biases, K = {same['K']}", levels=copying)""",
    """>>>
narrow = claims.rows(table, {"n_places": 0})
wider = claims.rows(wide, {"K": tuple(narrow["K"].unique()), "positions": tuple(narrow["positions"].unique())})
plot_sweep(pd.concat([narrow, wider]), "positions", "accuracy_ic", color="n_places", title="As the paper ran it (no room for places), and at equal width", levels=copying)""",
    """
## When it appears

The step at which ICL rises above copying, at the largest K.
""",
    """>>>
most = int(wide["K"].max())
steps = {}
for code in codes:
    point = change_points.emergence(claims.rows(wide, {"positions": code, "K": most}), ["accuracy_above_copying"], direction="up").points[0]
    steps[code] = {"step": point.at.value, "low": point.at.low, "high": point.at.high, "seeds that change": point.n_changed, "level after": point.after}
pd.DataFrame(steps).T.round(2)""",
    """
## Verdict, from the numbers

A code raises the threshold where ICL accuracy, averaged over the same K and paired by seed, is lower with it than with the other. Positive effects speak for the claim.
""",
    """>>>
same_k = {"positions": "rope", "K": same["K"], "n_places": 32}
found = [
    claims.claim(f"RoPE raises the threshold, against {other}", claims.difference(wide, "accuracy_ic", {"positions": "rope"}, {"positions": other}))
    for other in ("one_hot", "alibi", "none")
]
released = ("rope_interleaved_bug", "the released map raises the threshold, against")
found += [claims.claim(f"{released[1]} {other}", claims.difference(wide, "accuracy_ic", {"positions": released[0]}, {"positions": other})) for other in ("rope", "one_hot")]
bias = claims.difference(table, "accuracy_ic", same_k | {"qkv_bias": False}, same_k | {"qkv_bias": True})
found.append(claims.claim("biases help RoPE", bias))
print(*found, sep="\\n")""",
    """>>>
claims.verdict_table(found).round(3)""",
    """
## Live: a correct RoPE and the released map, a few seconds of training
""",
    """>>>
from mechicl.training.toys.train import train_toy

live = {}
for code in ("rope", "rope_interleaved_bug"):
    live[code] = train_toy(recipe("cpu", positions=code, steps=100, points=6, probe_n=256), progress=False).table.iloc[-1]
pd.DataFrame(live).T[["step", "loss", "accuracy_ic", "cla_ic"]].round(3)""",
    """
## Recap

A correct RoPE gives scores that know the offset only; half of the variance of the released map's does not. The table above says what that, the width and the biases do to in-context learning at this size.
""",
    """>>>
assert shares["rotate"] < 1e-6 < 0.4 < shares["rotate_interleaved_bug"]
assert all(run["cla_ic"] > 0.5 for run in live.values())""",
]

DECODER_SCALE = [
    """
# Do larger decoders learn from the prompt, or by heart?

Huang et al. (2026) report that larger models lean towards answers from the weights, and that with two modalities a deeper decoder needs fewer classes of the second one (so that at the same few classes it does better). Here
depth (1, 2, 4 layers) and
width change with one modality; with two, decoders of 2 and 4 layers, each after a first stage of its own, meet K2 classes of the second modality.

The models are the **cpu preset** (Adam, few steps), not the paper's own schedule. Table: `mechicl sweep notebooks/sweeps/NAME.toml`; three seeds, intervals over seeds (Student).
""",
    """>>>
table = pd.read_parquet(results / "NAME.parquet")
one, two = table[table["preset"] == "cpu"], table[table["preset"] == "cpu_multimodal"]
runs = bands.at_step(table)
print(len(runs), "models,", runs["seed"].nunique(), "seeds, last step", int(runs["step"].max()))
runs.groupby(["preset", "n_layers", "n_places"]).size()""",
    """
## Measure: depth, one modality
""",
    """>>>
deep = claims.rows(one, {"n_places": 0})
figure = plot_sweep(deep, "n_layers", ["accuracy_ic", "accuracy_iw"], facet="K", title="Depth: in context against in the weights")
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_depth.png", scale=2)
figure""",
    """
One layer cannot do it: a label must first learn what stands before it. Here is how the circuit grows with two layers, and when its parts appear.
""",
    """>>>
most = int(one["K"].max())
names = ["accuracy_ic", "accuracy_iw", "cla_ic", "ph1_0.0", "ila_0.0", "ih_1.0"]
shown = claims.rows(deep, {"n_layers": 2, "K": most})
grown = change_points.emergence(shown, names, least=0.02, direction="up")
print(grown.verdict)
plot(bands.seed_bands(shown, names, setting=f"2 layers, K = {most}", n=512), changes=grown)""",
    """
## Measure: width, one modality

64 coordinates that no token uses: the same data, a stream twice as wide.
""",
    """>>>
flat = claims.rows(one, {"n_layers": 2})
plot_sweep(flat, "n_places", ["accuracy_ic", "accuracy_iw"], facet="K", log_x=False, title="Width: in context against in the weights")""",
    """
## Measure: depth, two modalities
""",
    """>>>
figure = plot_sweep(two, "n_layers", ["accuracy_ic", "accuracy_iw"], facet="K2", title="Two modalities, K2 classes of the second")
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_two_modalities.png", scale=2)
figure""",
    """
## Verdict, from the numbers

*Lean*: in-weights accuracy minus ICL accuracy. Effects are paired by seed; "holds" where the whole interval is above zero.
""",
    """>>>
leaning = deep.assign(lean=deep["accuracy_iw"] - deep["accuracy_ic"])
fewest = int(two["K2"].min())
wide = flat.assign(lean=flat["accuracy_iw"] - flat["accuracy_ic"])
found = [
    claims.claim("two layers learn in context better than one", claims.difference(deep, "accuracy_ic", {"n_layers": 1}, {"n_layers": 2})),
    claims.claim("four layers lean to the weights more than two", claims.difference(leaning, "lean", {"n_layers": 2}, {"n_layers": 4})),
    claims.claim("a wider stream leans to the weights", claims.difference(wide, "lean", {"n_places": 0}, {"n_places": 64})),
    claims.claim(f"at K2 = {fewest} four layers do better than two", claims.difference(two, "accuracy_ic", {"n_layers": 2, "K2": fewest}, {"n_layers": 4, "K2": fewest})),
]
print(*found, sep="\\n")""",
    """>>>
claims.verdict_table(found).round(3)""",
    """
## Live: one layer and two, a few seconds of training
""",
    """>>>
from mechicl.training.toys.train import train_toy
from mechicl.training.toys.recipe import recipe

live = {n: train_toy(recipe("cpu", n_layers=n, steps=100, points=6, probe_n=256), progress=False).table.iloc[-1] for n in (1, 2)}
pd.DataFrame(live).T[["step", "loss", "accuracy_ic", "cla_ic"]].round(3)""",
    """
## Recap

Both depths find the plateau of copying any label within seconds; the rest takes the circuit of two layers. What more layers and a wider stream do is in the table above, at this size and with three seeds.
""",
    """>>>
assert all(run["cla_ic"] > 0.5 for run in live.values())""",
]
