"""Cells of the notebooks on two modalities, 04 and 05, and of the one over all models, 07."""

MODALITIES = [
    """
# How many classes of a second modality does in-context learning need?

An exemplar is now [item of modality 1, item of modality 2, label]. Huang et al. (2026) report an asymmetry: after a first stage on K1 = 8192 classes of modality 1 alone, K2 = 256 classes of modality 2
suffice for ICL near .95, and training both from the start (early fusion) turns the asymmetry around. But in their bursty sequences the query's item of modality 1 alone tells the answer. So the **controls**: the query
without that item, with a wrong one, and labels that neither modality tells alone.

The models are the **cpu preset** (Adam, few steps), not the paper's own schedule. Table: `mechicl sweep notebooks/sweeps/NAME.toml`; three seeds, intervals over seeds (Student).
""",
    """>>>
table = pd.read_parquet(results / "NAME.parquet")
runs = bands.at_step(table)
print(len(runs), "models,", runs["seed"].nunique(), "seeds, last step", int(runs["step"].max()))
plain = claims.rows(table, {"labels": "pair", "m1_query": "on"})
plain = plain.assign(start=plain["early_fusion"].map({True: "both from the start", False: "after a first stage"}))
both = claims.rows(plain, {"K1": claims.base_of(plain)["K1"]})
runs.groupby(["early_fusion", "labels", "m1_query"]).size()""",
    """>>>
from mechicl.data.gaussian import chance
from mechicl.training.toys.recipe import recipe

copying = {"copying any label": chance(recipe("cpu_multimodal").task, "ic")["context"]}
copying""",
    """
## Measure: classes of the second modality
""",
    """>>>
figure = plot_sweep(both, "K2", ["accuracy_ic"], color="start", title="ICL over the classes of modality 2", levels=copying)
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_k2.png", scale=2)
figure""",
    """
Right after the first stage the decoder can do it with modality 1 alone. The growth of one setting, from that start:
""",
    """>>>
k2 = int(sorted(both["K2"].unique())[1])
one = claims.rows(both, {"K2": k2, "start": "after a first stage"})
names = ["accuracy_ic", "accuracy_iw", "cla_ic", "ph1_0.0", "ph2_0.0", "ila_0.0", "ila2_0.0", "ih_1.0"]
plot(bands.seed_bands(one, names, setting=f"K2 = {k2} after a first stage", n=512), changes=change_points.emergence(one, names, least=0.02, direction="up"))""",
    """
## Measure: which modality may be poor?

Both modalities from the start. Either modality 1 is rich and modality 2 has few classes, or the other way round.
""",
    """>>>
fused = plain[plain["early_fusion"]]
rich = int(fused["K1"].max())
poor2 = claims.rows(fused, {"K1": rich}).assign(few="modality 2", classes=lambda t: t["K2"])
poor1 = fused[fused["K1"] < rich].assign(few="modality 1", classes=lambda t: t["K1"])
shared = tuple(int(k) for k in sorted(set(poor1["classes"]) & set(poor2["classes"])))
poor = claims.rows(pd.concat([poor1, poor2]), {"classes": shared})
poor = poor[["cell", "seed", "few", "classes", "step", "accuracy_ic", "accuracy_iw", "cla_ic"]]
plot_sweep(poor, "classes", "accuracy_ic", color="few", title="Early fusion: ICL where one modality has few classes", levels=copying)""",
    """
## Control: what does the query's first modality tell?

*off*: the query has no item of modality 1. *mismatched*: it has that of another exemplar, so that a model that listens to modality 1 answers wrongly. Models are trained and tested in each condition.
""",
    """>>>
query = claims.rows(table, {"labels": "pair", "early_fusion": False, "K2": 256})
figure = plot_sweep(query, "m1_query", ["accuracy_ic", "cla_ic"], title="The query's item of modality 1, K2 = 256 after a first stage", levels=copying)
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_query.png", scale=2)
figure""",
    """>>>
joint = claims.rows(table, {"early_fusion": True, "K2": 256, "K1": int(both["K1"].iloc[0])})
plot_sweep(joint, "labels", ["accuracy_ic", "cla_ic"], title="Labels that neither modality tells alone (from the start, K2 = 256)")""",
    """
## Verdict, from the numbers
""",
    """>>>
base = {"K2": 256, "labels": "pair", "early_fusion": False, "K1": int(both["K1"].iloc[0])}
level = bands.runs_estimate(claims.by_seed(table, "accuracy_ic", base | {"m1_query": "on"}), unit="accuracy")
first, fusion = {"start": "both from the start"}, {"start": "after a first stage"}
off, wrong = (claims.difference(table, "accuracy_ic", base | {"m1_query": "on"}, base | {"m1_query": q}) for q in ("off", "mismatched"))
found = [
    claims.claim("after a first stage K2 = 256 gives ICL of at least .9 (paper: about .95)", level, bar=0.9),
    claims.claim("a first stage lowers the K2 that is needed", claims.difference(both, "accuracy_ic", first, fusion)),
    claims.claim("early fusion: few classes hurt modality 2 more", claims.difference(poor, "accuracy_ic", {"few": "modality 2"}, {"few": "modality 1"})),
    claims.claim("without the query's modality 1, ICL is as good (within .05)", off, bar=-0.05),
    claims.claim("with a wrong modality 1, ICL is as good (within .05)", wrong, bar=-0.05),
]
print(*found, sep="\\n")""",
    """>>>
claims.verdict_table(found).round(3)""",
    """
## Live: two modalities, a few seconds of training
""",
    """>>>
from mechicl.training.toys.train import train_toy

run = train_toy(recipe("cpu_multimodal", steps=100, points=6, probe_n=256), progress=False)
run.table[["step", "loss", "accuracy_ic", "accuracy_iw", "cla_ic"]].round(3)""",
    """
## Recap

The K2 curve says how many classes of the second modality these models need, the controls say how much of that is the first modality's doing, and the table above says what of the paper's asymmetry is there at
this size and with three seeds.
""",
    """>>>
assert run.table["cla_ic"].iloc[-1] > 0.5""",
]

KNOCK_OUTS = [
    """
# What can the model not do without?

Huang et al. (2026) switch parts of a trained toy off and report ICL accuracies of .970 (whole), .199 (without the previous-token head), .062 (without the induction head), .336 (modality 2 zeroed) and .063
(modality 1 zeroed). The same here, on new classes, with intervals over models and with **controls**: random heads where a model has any to spare, and as many item tokens of either modality, drawn at random.

The models are the **cpu preset** (Adam, few steps). Table: `python notebooks/make/knock_outs.py notebooks/sweeps/NAME.toml --out notebooks/results/NAME.parquet`.
""",
    """>>>
from mechicl.analysis.ablation import knockouts

everything = pd.read_parquet(results / "NAME.parquet")
table = everything[everything["off"] == "zero"]
two, one = (knockouts.table_of(table[table["modalities"] == n]) for n in (2, 1))
print(two.n_models, "models of two modalities and", one.n_models, "of one;", two.n, "sequences each")
print(two.note)""",
    """
A head that carries half of the circuit cannot be matched by a random one in a model of one head a layer: the only other head is the circuit's other half. What remains as a control is the spread over models, the
head's own mean output in place of zero (below) and, for the modalities, random tokens.

## Intervene: two modalities
""",
    """>>>
figure = plot(two)
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_two_modalities.png", scale=2)
figure""",
    """>>>
two.to_frame()[["name", "kind", "accuracy", "low", "high", "change", "change_low", "change_high", "cla", "models", "n"]].round(3)""",
    """
Zero takes away more than the message: later layers never met it. With the head's mean output in its place only what varies over sequences and positions is gone.
""",
    """>>>
gentle = knockouts.table_of(everything[(everything["off"] == "mean") & (everything["modalities"] == 2) & everything["kind"].isin(["intact", "heads"])])
gentle.to_frame()[["name", "accuracy", "low", "high", "change", "change_low", "change_high", "cla", "models", "n"]].round(3)""",
    """
## Intervene: one modality
""",
    """>>>
figure = plot(one)
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_one_modality.png", scale=2)
figure""",
    """
## Beside the published numbers

Whether the published accuracy lies within our interval over models. Copying any label of the context is right in about half, naming any label at all in 1 of 32: a knock-out that leaves the first level has lost the
match, one that leaves the second has lost the labels too.
""",
    """>>>
published = {"intact": 0.970, knockouts.PREVIOUS: 0.199, knockouts.INDUCTION: 0.062, knockouts.SECOND: 0.336, knockouts.FIRST: 0.063}
rows = []
for name, value in published.items():
    ours = two[name].accuracy
    rows.append({"": name, "published": value, "ours": ours.value, "low": ours.low, "high": ours.high, "within": ours.low <= value <= ours.high, "CLA": two[name].cla.value})
pd.DataFrame(rows).set_index("").round(3)""",
    """
## Verdict, from the numbers
""",
    """>>>
lost = {name: -table[(table["modalities"] == 2) & (table["name"] == name)].set_index("seed")["change"] for name in published}
loss = {name: bands.runs_estimate(x.to_numpy(), unit="change") for name, x in lost.items()}
gap = bands.runs_estimate((lost[knockouts.FIRST] - lost[knockouts.SECOND]).to_numpy(), unit="change")
found = [
    claims.claim("ICL needs the previous-token head", loss[knockouts.PREVIOUS]),
    claims.claim("ICL needs the induction head", loss[knockouts.INDUCTION]),
    claims.claim("ICL needs modality 1", loss[knockouts.FIRST]),
    claims.claim("ICL needs modality 2", loss[knockouts.SECOND]),
    claims.claim("modality 1 is needed more than modality 2", gap),
]
print(*found, sep="\\n")""",
    """>>>
claims.verdict_table(found).round(3)""",
    """
## Live: a circuit that is known

A planted circuit that reads modality 1 only. Without its previous-token head or without modality 1 the match is lost, and copying any label (about half) is left; without its induction head the labels are lost too; without modality 2, or
without as many random heads, nothing is lost.
""",
    """>>>
from mechicl.data.gaussian import MultimodalTask
from mechicl.models.planted import planted_vectors

task = MultimodalTask(K1=64, K2=32, N=4, B=2)
planted = planted_vectors(task, n_heads=4)
heads = {knockouts.PREVIOUS: planted.previous_token, knockouts.INDUCTION: planted.matching}
live = knockouts.knock_out_table(planted.model, task, heads=heads, n=128, n_random=5)
live.to_frame()[["name", "accuracy", "low", "high", "cla"]].round(3)""",
    """
## Recap

On the planted circuit the table says what is known to be true; on trained models it says which parts they need, beside controls. The verdict above is at this size, with this many models.
""",
    """>>>
assert live["intact"].accuracy.low > live[knockouts.FIRST].accuracy.high
assert live[knockouts.SECOND].change.value == 0""",
]

MEASURES = [
    """
# Which measure of the circuit predicts in-context learning?

Huang et al. (2026) correlate attention measures with ICL accuracy over trained models: PH(1) of layer 1 .72, CLA .65, IH of layer 2 .61, TLA of layer 1 .59 [from a summary of the paper]. Here the models of
notebooks 02, 03, 06 and of a factorial design of 24 settings are pooled: two layers, one modality. Models of one setting resemble each other, so intervals resample **settings**, p-values deal whole settings out, and the
random forest is judged on settings it has not seen, beside a **control** with the outcome shuffled.

The models are the **cpu preset** (Adam, few steps). Tables: `mechicl sweep notebooks/sweeps/*.toml`. Layers are counted from 0 below, from 1 in the paper.
""",
    """>>>
from mechicl.analysis.trainings import trends

names = ["02_icl_against_in_weights", "03_does_rope_raise_the_threshold", "06_decoder_scale", "NAME"]
tables = [pd.read_parquet(results / f"{name}.parquet") for name in names if (results / f"{name}.parquet").exists()]
tables = [t[t["preset"] == "cpu"] for t in tables]
tables = [t[t["n_layers"] == 2] if "n_layers" in t.columns else t for t in tables]
common = min(int(t["step"].max()) for t in tables)  # some sweeps trained longer
table = trends.pooled([t[t["step"] <= common] for t in tables])
measures = ["cla", "cla_ic", *(f"{m}_{l}.0" for m in ("ph1", "ila", "tila", "tiia", "tla", "ih") for l in (0, 1))]
frame, outcome, setting = trends.models(table, measures=measures)
print(len(frame), "models in", setting.max() + 1, "settings; ICL accuracy", outcome.describe()[["min", "50%", "max"]].round(2).to_dict())""",
    """
## Measure: correlations at the end of training
""",
    """>>>
end = trends.correlations(table, measures=measures)
figure = plot(end)
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_correlations.png", scale=2)
figure""",
    """>>>
linear = trends.correlations(table, measures=measures, kind="pearson")
published = {"ph1_0.0": 0.72, "cla": 0.65, "ih_1.0": 0.61, "tla_0.0": 0.59}
known = [name for name in published if name in linear.value]
beside = pd.DataFrame([{"measure": name, "published": published[name], "ours": linear.value[name].value, "low": linear.value[name].low, "high": linear.value[name].high,
                        "p (Holm)": linear.p_corrected[name]} for name in known])
beside.round(3)""",
    """
A measure that goes with the outcome at the end may be no more than another reading of it (IH looks where the answer is). Does it tell, **early** in training, which models will learn in context?
""",
    """>>>
early = int(table["step"][table["step"] <= table["step"].max() / 10].max())
before = trends.correlations(table, measures=measures, at=early)
plot(before)""",
    """
## Measure: a small random forest, on settings it has not seen
""",
    """>>>
forest = trends.forest(table, measures=measures, n_trees=60, n_repeats=3, n_shuffled=19)
figure = plot(forest)
figure.update_layout(paper_bgcolor="white", plot_bgcolor="white").write_image(figures / "NAME_forest.png", scale=2)
figure""",
    """
## Verdict, from the numbers
""",
    """>>>
called = {"ph1_0.0": "PH(1) of the first layer", "cla": "CLA", "ih_1.0": "IH of the second layer", "tla_0.0": "TLA of the first layer"}
found = [claims.claim(f"{called[name]} goes with ICL accuracy", linear.value[name]) for name in known]
best = max(end.value, key=lambda name: end.value[name].value)
found.append(claims.claim("the forest explains unseen settings", forest.r2))
print(*found, f"strongest rank correlation: {best} {end.value[best]}", f"shuffled control: r2 at most {forest.shuffled.max():.2f}, p = {forest.p:.2g}", sep="\\n")""",
    """>>>
claims.verdict_table(found).round(3)""",
    """
## Live: the same on a handful of models

Six trainings of a few seconds in one batched step; what comes out is the table's shape, not evidence.
""",
    """>>>
from mechicl.training.toys.train import train_many
from mechicl.training.toys.recipe import recipe

short = train_many([recipe("cpu", K=k, B=b, steps=60, points=4, probe_n=128) for k in (64, 1024, 8192) for b in (2, 4)], progress=False)
rows = [run.table.assign(cell=str(i), preset="cpu", seed=0, K=run.recipe.task.K, B=run.recipe.task.B) for i, run in enumerate(short)]
live = pd.concat(rows)[["cell", "preset", "seed", "K", "B", "step", "accuracy_ic", *measures]]
trends.correlations(live, measures=["cla_ic", "ih_1.0"], n_draws=200).to_frame().round(2)""",
    """
## Recap

The correlations say which measures go with ICL over these models, the early ones which foretell it, and the forest's control whether any of it generalises to settings not seen.
""",
    """>>>
assert forest.shuffled.max() < 0.5
assert len(live["cell"].unique()) == 6""",
]
