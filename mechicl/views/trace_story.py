"""What a trace may claim, in sentences made from its numbers: the way of the answer, the heads that move it, the circuit. No HTML here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mechicl.results import Circuit, Estimate, PatchEffects, Trace
from mechicl.views.story import sentence

STRONG = 0.2
"""A cell is part of the way if it alone brings back (or costs) at least this share of the difference, and passes its corrected test."""

PAIRS = {
    "swap_exemplars": "two labels' pictures change places",
    "swap_labels": "two labels change places in the examples",
    "swap_query": "the query shows another label's picture",
    "permute_labels": "the labels are dealt out anew",
    "wrong_exemplar": "the exemplars of the answer show things of another class",
    "reformat": "the same content in another form",
    "blur": "the pictures are blurred in one of them",
    "noise": "the pictures are noise in one of them",
}
"""How pairs are made -> what differs between the two prompts of a pair."""


def route(effects: PatchEffects, site: str = "resid_pre") -> list[tuple[str, tuple[tuple[str, float], ...]]]:
    """Where the answer is, layer by layer: (layers in words, ((span, share), ...)), layers with the same spans together.

    A span counts where its cell passes its corrected test and moves the run by at least `STRONG` of the difference.
    """
    found = effects.sites[site]
    moved = np.asarray(found.value) if effects.direction == "denoise" else 1.0 - np.asarray(found.value)
    out: list[tuple[list[int], tuple[tuple[str, float], ...]]] = []
    for row, layer in enumerate(found.coords["layer"]):
        passed = [j for j in range(moved.shape[1]) if moved[row, j] >= STRONG and found.p_corrected[row, j] < 0.05]
        spans = tuple((str(found.coords["span"][j]), float(moved[row, j])) for j in sorted(passed, key=lambda j: -moved[row, j]))
        if out and {s for s, _ in out[-1][1]} == {s for s, _ in spans}:
            out[-1][0].append(int(layer))
        else:
            out.append(([int(layer)], spans))
    return [(f"layer {ls[0]}" if len(ls) == 1 else f"layers {ls[0]} to {ls[-1]}", spans) for ls, spans in out]


def span_words(span: str) -> str:
    """A span as the report calls it."""
    return "the template's tokens (glue)" if span == "glue" else f"the {span}" if not span.startswith("the ") else span


def route_sentence(effects: PatchEffects) -> str:
    """The way of the answer in one or two sentences, from the cells that pass."""
    if "resid_pre" not in effects.sites:
        return ""
    legs = [(layers, spans) for layers, spans in route(effects) if spans]
    if not legs:
        return _nothing_passes(effects, "resid_pre") or (
            f"No single part of the prompt carries {100 * STRONG:.0f}\u00a0% of the answer at any layer: it is spread over several."
        )
    told = [f"at the start of {layers}, in {_listed([f'{span_words(s)} ({v:.2f})' for s, v in spans])}" for layers, spans in legs]
    each = (
        "brings back when it is put into the corrupt run"
        if effects.direction == "denoise"
        else "costs when it is taken from the corrupt run"
    )
    text = f"What tells the two answers apart stands {'; '.join(told)} (share of the answer that each of them alone {each})."
    ends = [span for span, _ in legs[-1][1]]
    if "last token" not in ends:
        text += " The last token does not hold it before the last layer that was patched: that layer fetches it."
    return text


def heads_sentence(effects: PatchEffects, limit: int = 8) -> str:
    """Heads whose output, exchanged at all tokens, moves the answer; best first."""
    site = effects.sites.get("z")
    if site is None or tuple(site.axes) != ("layer", "head"):
        return ""
    moved = np.asarray(site.value) if effects.direction == "denoise" else 1.0 - np.asarray(site.value)
    passed = [cell for cell in np.ndindex(*moved.shape) if site.p_corrected[cell] < 0.05 and abs(moved[cell]) >= 0.05]
    if not passed:
        return _nothing_passes(effects, "z") or "No head's output alone moves the answer by a twentieth."
    passed.sort(key=lambda cell: -abs(moved[cell]))
    named = [f"{site.coords['layer'][a]}.{site.coords['head'][b]} ({moved[a, b]:.2f})" for a, b in passed[:limit]]
    more = f" and {len(passed) - limit} more" if len(passed) > limit else ""
    return f"Of the heads' outputs, exchanged one at a time, {len(passed)} of {moved.size} move it by a twentieth or more: {', '.join(named)}{more}."


def _nothing_passes(effects: PatchEffects, site: str) -> str:
    """Said where no cell of a site passes its corrected test: what is largest, and that it proves nothing. "" where some do."""
    found = effects.sites[site]
    if (np.nan_to_num(found.p_corrected, nan=1.0) < 0.05).any():
        return ""
    best = effects.top(site, 1)
    if not best:
        return ""
    at = found.index(**dict(zip(found.axes, best[0], strict=True)))
    where = ", ".join(f"{axis} {label}" if isinstance(label, int) else str(label) for axis, label in zip(found.axes, best[0], strict=True))
    return f"No cell of {site.replace('_', ' ')} passes its corrected test on {effects.n} pairs, so nothing is claimed; the largest is {where} ({found.value[at]:.2f})."


def carries(circuit: Circuit) -> bool:
    """The circuit does most of the work: faithfulness above one half with its whole interval, and above the random circuits'."""
    above = circuit.n_draws == 0 or circuit.faithfulness.low > circuit.random_high
    return bool(circuit.faithfulness.low > 0.5 and above)


def circuit_sentence(circuit: Circuit) -> str:
    """What may be said of the circuit: how much it does on pairs that did not choose it, beside random circuits and the rest of the model."""
    f, rest = circuit.faithfulness, circuit.completeness
    start = f"{circuit.n_edges} of {circuit.n_edges_possible} edges carry {_share(f)} of the difference between clean and corrupt runs"
    where = (
        f"on {circuit.n} pairs that did not choose them"
        if circuit.held_out
        else f"on the {circuit.n} pairs that also chose them, which flatters them"
    )
    random = (
        f"; {circuit.n_draws} random circuits of as many edges carry {round(100 * circuit.random_mean)}\u00a0% on average (p = {circuit.p_random:.2g})"
        if circuit.n_draws
        else ""
    )
    left = f" Without these edges the model carries {_share(rest)}: " + (
        "nothing else does the work."
        if rest.high < 0.2
        else "part of the work is done elsewhere too."
        if rest.low > 0.05
        else "little else does the work."
    )
    verdict = "" if carries(circuit) else " This is not enough to call them the circuit."
    return f"{start} {where}{random}.{left}{verdict}".replace(" -", " \u2212").replace("(-", "(\u2212")


def trace_notes(trace: Trace) -> list[str]:
    """What the page says where a part is missing, and what readers of the parts must know."""
    out = list(trace.notes)
    for part in (trace.patching, trace.edge_scores, trace.circuit):
        out += list(part.notes if part is not None else ())
    return [sentence(n) for n in dict.fromkeys(out)]


def _share(e: Estimate) -> str:
    value, low, high = (f"{round(100 * v) + 0:d}" for v in (e.value, e.low, e.high))
    return f"{value}\u00a0% ({low} to {high})"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
