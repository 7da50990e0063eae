"""Notebooks 08 and 09: how the answer gets from the right exemplar to the query, in the bundled model and in a trained toy."""

from __future__ import annotations

SETUP = """>>>
import os
from pathlib import Path

import mechicl
from mechicl import circuit_curve, compare_circuits, eap, find_circuit, patch, plot, span_knockout

figures = Path(os.environ.get("MECHICL_FIGURES", "../figures"))"""

VLM = [
    """
# How does the answer get from the right exemplar to the query?

The bundled vision-language model names a novel concept after eight exemplars (4 classes x 2 shots). Attention says where heads look (notebook 01); here activations of one run are put into
another, so that each step is a cause. Every effect is 0 in the corrupt run and 1 in the clean one, with a 95 % interval over episodes and p corrected over all cells.

Two kinds of minimal pairs, equal token for token. **query**: the query shows another exemplar's class. **exemplars**: exemplars of two classes exchange their pictures; the query stays. Both
change the answer, but by another way: what the query asks for, and what the exemplars offer.""",
    """>>>
import numpy as np
from mechicl.data import concepts
from mechicl.prompts.corrupt import minimal_pairs

model = mechicl.load("demo")
episodes = concepts.draw(24, classes=4, shots=2, size=28, seed=5, syllables=(2, 2))
pairs = {"query": minimal_pairs(model.renderer, episodes, "swap_query"), "exemplars": minimal_pairs(model.renderer, episodes, "swap_exemplars")}
for name, some in pairs.items():
    print(name, some.n, "pairs;", len(some.skipped), "skipped")
accuracy = mechicl.icl_accuracy(model, episodes, progress=False)
print("accuracy", accuracy.accuracy, "zero-shot", accuracy.zero_shot)""",
    """
## Where the answer is, layer by layer

The residual stream before each layer, put from the clean run into the corrupt one (denoising), for one group of tokens at a time. A group with effect 1 carries everything there is to
know at that depth; the groups with effect 0 are the control.""",
    """>>>
streams = {name: patch(model, some, sites=("resid_pre",), by="span", progress=False) for name, some in pairs.items()}
plot(streams["query"]).write_html(figures / "08_stream_query.html", include_plotlyjs="directory")
plot(streams["query"])""",
    """>>>
plot(streams["exemplars"]).write_html(figures / "08_stream_exemplars.html", include_plotlyjs="directory")
plot(streams["exemplars"])""",
    """>>>
way = {}
for name, effects in streams.items():
    site = effects["resid_pre"]
    best = site.value.argmax(1)
    way[name] = [site.coords["span"][k] for k in best]
    for layer, k in enumerate(best):
        print(f"{name}, before layer {layer}: {way[name][layer]} {site.value[layer, k]:.2f} [{site.low[layer, k]:.2f}, {site.high[layer, k]:.2f}], "
              f"next best {np.sort(site.value[layer])[-2]:.2f}, p = {site.p_corrected[layer, k]:.2g}, n = {effects.n}")""",
    """
## Which heads move it

What each head hands to the output projection, at all positions, in both kinds of pairs.""",
    """>>>
heads = {name: patch(model, some, sites=("z",), by="head", progress=False) for name, some in pairs.items()}
for name, effects in heads.items():
    print(name, *(f"{layer}.{head} {effects['z'].value[layer, head]:+.2f}" for layer, head in effects.top("z", 6)))
plot(heads["exemplars"])""",
    """
## Cut the ways

The same story from the other side: some tokens are kept from reading others (attention -inf before the softmax), in all layers, on 24 clean episodes. Controls: as many cells elsewhere, five draws.""",
    """>>>
cuts = [("right open", "right image"), ("right label", "right open"), ("right label", "right image"), ("last token", "right label"),
        ("last token", "query image"), ("last token", "wrong label")]
knocked = span_knockout(model, episodes, cuts, progress=False)
print(knocked.to_frame()[["name", "accuracy", "change", "p_corrected", "control_accuracy", "n"]].round(3).to_string(index=False))
plot(knocked)""",
    """
## The circuit, edge by edge

Edge attribution with integrated gradients scores every edge; 24 of them are run exactly as a check. `find_circuit` keeps as few edges as give .85 of the effect on one half of the pairs; faithfulness and its
random control (as many edges, matched in kind and layer) come from the other half.""",
    """>>>
scores = {name: eap(model, some, method="EAP-IG", by_span=True, progress=False) for name, some in pairs.items()}
circuits = {name: find_circuit(model, some, scores[name], places=scores[name], name=name, progress=False) for name, some in pairs.items()}
for name, circuit in circuits.items():
    print(name, "| gradients against exact runs:", scores[name].agreement)
    print(f"{len(circuit.edges)} of {circuit.n_edges_possible} edges, faithfulness {circuit.faithfulness}, as many random edges {circuit.random_mean:.3f} "
          f"(97.5 %: {circuit.random_high:.3f}, {circuit.n_draws} draws), the rest {circuit.completeness}")
    print(*(edge.name for edge in circuit.edges), sep=", ")""",
    """>>>
curve = circuit_curve(model, pairs["exemplars"], scores["exemplars"], places=scores["exemplars"], ks=(8, 12, 16, 20, 24, 32, 48, 96), n_random=10, progress=False)
figure = plot(curve)
figure.write_html(figures / "08_circuit.html", include_plotlyjs="directory")
figure""",
    """
The two circuits meet in the last layer's heads: one brings the query's picture to their queries, the other the exemplars' pictures to their keys. How much they share, beside what chance would:""",
    """>>>
for level in ("node", "edge"):
    overlap = compare_circuits(circuits["query"], circuits["exemplars"], level=level)
    print(f"{level}s: {overlap.n_shared} shared, Jaccard {overlap.jaccard}, by chance {overlap.chance:.2f}, p = {overlap.p:.2g}: {', '.join(overlap.shared)}")""",
    """
## What can be read where

The model's own unembedding, laid on the stream after every layer (logit lens; margin of the right label over the best wrong one), beside the same with the labels dealt out anew.""",
    """>>>
lens = mechicl.logit_lens(model, episodes, progress=False)
plot(lens)""",
    """
## Verdict""",
    """>>>
faithful = {name: circuit.faithfulness.low > circuit.random_high for name, circuit in circuits.items()}
lost = {row.name: row.accuracy.value for row in knocked.rows}
print("query:", " -> ".join(way["query"]))
print("exemplars:", " -> ".join(way["exemplars"]))
print("circuits above the random band:", faithful)
print(f"accuracy without the last token reading right labels: {lost['last token <- right label']:.2f}")
assert way["query"][0] == "query image"
assert way["query"][-1] == "last token"
assert all(faithful.values())""",
]

TOY = [
    """
# The same calls on a trained toy

A transformer of two layers with four heads each, trained for 3,000 steps on sequences of vectors and labels (`mechicl train toy --set n_heads=4 --set positions=one_hot+rope --seed 1`), labels classes that it has
never seen. The calls are those of notebook 08. One trained model: what is said here is about it, not about trainings.""",
    """>>>
import torch
from mechicl.data.gaussian import draw
from mechicl.prompts.disturb import vector_pairs
from mechicl.training.toys.train import load_toy

model = load_toy("results/toy_four_heads", step=3000)
drawn = draw(model.renderer.task, 96, torch.Generator().manual_seed(1), split="ic")
pairs = {"query": vector_pairs(drawn, "swap_query"), "exemplars": vector_pairs(drawn, "swap_exemplars")}
print({name: some.n for name, some in pairs.items()}, "of 96; the others show one class only")
print(mechicl.icl_accuracy(model, pairs["query"].clean, progress=False).accuracy)""",
    """>>>
streams = {name: patch(model, some, sites=("resid_pre", "resid_mid"), by="span", progress=False) for name, some in pairs.items()}
plot(streams["exemplars"])""",
    """>>>
heads = {name: patch(model, some, sites=("z",), by="head", progress=False) for name, some in pairs.items()}
for name, effects in heads.items():
    print(name, *(f"{layer}.{head} {effects['z'].value[layer, head]:+.2f}" for layer, head in effects.top("z", 8)))
plot(heads["exemplars"])""",
    """
## Cut the ways""",
    """>>>
cuts = [("right label", "right text"), ("last token", "right label"), ("last token", "right text"), ("right label", "wrong text")]
knocked = span_knockout(model, pairs["query"].clean, cuts, progress=False)
print(knocked.to_frame()[["name", "accuracy", "change", "p_corrected", "control_accuracy", "n"]].round(3).to_string(index=False))
plot(knocked)""",
    """
## The circuit""",
    """>>>
scores = {name: eap(model, some, method="EAP-IG", by_span=True, progress=False) for name, some in pairs.items()}
circuits = {name: find_circuit(model, some, scores[name], places=scores[name], name=name, progress=False) for name, some in pairs.items()}
for name, circuit in circuits.items():
    print(name, "| gradients against exact runs:", scores[name].agreement)
    print(f"{len(circuit.edges)} of {circuit.n_edges_possible} edges, faithfulness {circuit.faithfulness}, as many random edges {circuit.random_mean:.3f} "
          f"(97.5 %: {circuit.random_high:.3f}, {circuit.n_draws} draws), the rest {circuit.completeness}")
    print(*(edge.name for edge in circuit.edges), sep=", ")""",
    """>>>
curve = circuit_curve(model, pairs["exemplars"], scores["exemplars"], places=scores["exemplars"], n_random=20, progress=False)
figure = plot(curve)
figure.write_html(figures / "09_circuit.html", include_plotlyjs="directory")
figure""",
    """>>>
overlap = compare_circuits(circuits["query"], circuits["exemplars"], level="node")
print(f"nodes: {overlap.n_shared} shared, Jaccard {overlap.jaccard}, by chance {overlap.chance:.2f}, p = {overlap.p:.2g}: {', '.join(overlap.shared)}")
attribution = mechicl.direct_logits(model, pairs["query"].clean, progress=False)
plot(attribution)""",
    """
## Verdict""",
    """>>>
lost = {row.name: row.accuracy.value for row in knocked.rows}
faithful = {name: circuit.faithfulness.low > circuit.random_high for name, circuit in circuits.items()}
print(f"accuracy where labels cannot read their items: {lost['right label <- right text']:.2f}, where the query cannot read labels: {lost['last token <- right label']:.2f}")
print("circuits above the random band:", faithful)
assert lost["last token <- right label"] < lost["last token <- right text"]
assert all(faithful.values())""",
]
