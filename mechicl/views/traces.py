"""The sections of a trace: figures of patching and of the circuit with their words, and what is said where a part is missing."""

from __future__ import annotations

from typing import Any

from mechicl.results import Trace
from mechicl.views import captions, trace_story
from mechicl.views.page import Block, block
from mechicl.views.plots import plot


def trace_sections(trace: Trace | None) -> dict[str, Any] | None:
    """What the report's two sections are filled with: sentences, figures, notes; None where nothing was traced."""
    if trace is None:
        return None
    effects = trace.patching
    told = [say(effects) for say in (trace_story.route_sentence, trace_story.heads_sentence)] if effects is not None else []
    return {
        "told": [text for text in told if text],
        "route": [block("patching", "", plot(effects), captions.about_patching(effects), effects.to_frame())]
        if effects is not None
        else [],
        "claim": trace_story.circuit_sentence(trace.circuit) if trace.circuit is not None else "",
        "circuit": circuit_blocks(trace),
        "notes": trace_story.trace_notes(trace),
    }


def circuit_blocks(trace: Trace) -> list[Block]:
    """The graph with its slider, the circuit with its evidence, and the scores of all edges: those that there are."""
    out: list[Block] = []
    if trace.curve is not None:
        out.append(block("circuit-curve", "", plot(trace.curve), captions.about_curve(trace.curve), trace.curve.to_frame()))
    if trace.circuit is not None:
        out.append(block("circuit-graph", "", plot(trace.circuit), captions.about_circuit(trace.circuit), trace.circuit.to_frame()))
    if trace.edge_scores is not None:
        out.append(
            block("edge-scores", "", plot(trace.edge_scores), captions.about_edge_scores(trace.edge_scores), trace.edge_scores.to_frame())
        )
    return out
