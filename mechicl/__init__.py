"""Mechanistic interpretability of in-context learning, in toy transformers and in vision-language models.

The names below load what they need when they are first used, so that `import mechicl` costs what Python costs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechicl.analysis.ablation.ablate import ablate, dose_curve
    from mechicl.analysis.ablation.span_knockouts import span_knockout
    from mechicl.analysis.circuits.find import circuit_curve, evaluate_circuit, find_circuit
    from mechicl.analysis.circuits.overlap import compare_circuits
    from mechicl.analysis.comparison.checkpoints import series
    from mechicl.analysis.comparison.compare import compare
    from mechicl.analysis.comparison.improve import heads_improve
    from mechicl.analysis.comparison.words import in_words
    from mechicl.analysis.examples.anchored import compare_strategies
    from mechicl.analysis.gradients.attribution import attribute
    from mechicl.analysis.gradients.edge_attribution import eap
    from mechicl.analysis.heads.scoring import attention_by_role, score_heads
    from mechicl.analysis.icl import icl_accuracy
    from mechicl.analysis.link.evaluate import evaluate_link
    from mechicl.analysis.link.mechanism import link_circuit
    from mechicl.analysis.link.mechanism_compare import build_or_sharpen
    from mechicl.analysis.link.mechanism_prior import link_priors
    from mechicl.analysis.link.prior import informative_position, label_corruption
    from mechicl.analysis.link.rename import link_or_prior
    from mechicl.analysis.margin.contrast import contrast_margin
    from mechicl.analysis.patching.patch import patch
    from mechicl.analysis.patching.paths import path_patch
    from mechicl.analysis.patching.transplant import transplant
    from mechicl.analysis.readout.direct_logits import direct_logits
    from mechicl.analysis.readout.function_vector_effects import add_function_vector
    from mechicl.analysis.readout.function_vectors import function_vector, function_vector_scores
    from mechicl.analysis.readout.head_circuits import head_circuits
    from mechicl.analysis.readout.logit_lens import logit_lens
    from mechicl.analysis.shift.factors import factor_shares
    from mechicl.analysis.shift.kv_shift import kv_shift
    from mechicl.analysis.shift.similarity import similarity_test
    from mechicl.analysis.study import find_and_prove
    from mechicl.analysis.written_answers import written_answers
    from mechicl.models.load import load
    from mechicl.models.vlm import HookedVLM
    from mechicl.prompts.episode import Episode, Shot
    from mechicl.training.adapting.adapt import adapt
    from mechicl.views.plots import plot

__version__ = "0.1.0"

_HOMES = {
    "adapt": "mechicl.training.adapting.adapt",
    "compare": "mechicl.analysis.comparison.compare",
    "heads_improve": "mechicl.analysis.comparison.improve",
    "in_words": "mechicl.analysis.comparison.words",
    "series": "mechicl.analysis.comparison.checkpoints",
    "compare_strategies": "mechicl.analysis.examples.anchored",
    "compare_circuits": "mechicl.analysis.circuits.overlap",
    "circuit_curve": "mechicl.analysis.circuits.find",
    "evaluate_circuit": "mechicl.analysis.circuits.find",
    "find_circuit": "mechicl.analysis.circuits.find",
    "contrast_margin": "mechicl.analysis.margin.contrast",
    "load": "mechicl.models.load",
    "HookedVLM": "mechicl.models.vlm",
    "Episode": "mechicl.prompts.episode",
    "Shot": "mechicl.prompts.episode",
    "score_heads": "mechicl.analysis.heads.scoring",
    "attention_by_role": "mechicl.analysis.heads.scoring",
    "icl_accuracy": "mechicl.analysis.icl",
    "ablate": "mechicl.analysis.ablation.ablate",
    "dose_curve": "mechicl.analysis.ablation.ablate",
    "attribute": "mechicl.analysis.gradients.attribution",
    "eap": "mechicl.analysis.gradients.edge_attribution",
    "factor_shares": "mechicl.analysis.shift.factors",
    "function_vector_scores": "mechicl.analysis.readout.function_vectors",
    "function_vector": "mechicl.analysis.readout.function_vectors",
    "add_function_vector": "mechicl.analysis.readout.function_vector_effects",
    "direct_logits": "mechicl.analysis.readout.direct_logits",
    "evaluate_link": "mechicl.analysis.link.evaluate",
    "informative_position": "mechicl.analysis.link.prior",
    "label_corruption": "mechicl.analysis.link.prior",
    "build_or_sharpen": "mechicl.analysis.link.mechanism_compare",
    "link_circuit": "mechicl.analysis.link.mechanism",
    "link_priors": "mechicl.analysis.link.mechanism_prior",
    "link_or_prior": "mechicl.analysis.link.rename",
    "logit_lens": "mechicl.analysis.readout.logit_lens",
    "head_circuits": "mechicl.analysis.readout.head_circuits",
    "find_and_prove": "mechicl.analysis.study",
    "kv_shift": "mechicl.analysis.shift.kv_shift",
    "patch": "mechicl.analysis.patching.patch",
    "path_patch": "mechicl.analysis.patching.paths",
    "similarity_test": "mechicl.analysis.shift.similarity",
    "span_knockout": "mechicl.analysis.ablation.span_knockouts",
    "transplant": "mechicl.analysis.patching.transplant",
    "written_answers": "mechicl.analysis.written_answers",
    "plot": "mechicl.views.plots",
}
_MODULES = ("data", "prompts", "models", "analysis", "training", "views", "errors", "results")

__all__ = [
    "Episode", "HookedVLM", "Shot", "ablate", "adapt", "add_function_vector", "attention_by_role", "attribute",
    "build_or_sharpen", "circuit_curve", "compare", "compare_circuits", "compare_strategies", "contrast_margin",
    "direct_logits", "dose_curve", "eap", "evaluate_circuit", "evaluate_link", "factor_shares", "find_and_prove",
    "find_circuit", "function_vector", "function_vector_scores", "head_circuits", "heads_improve", "icl_accuracy", "in_words",
    "informative_position", "kv_shift", "label_corruption", "link_circuit", "link_or_prior", "link_priors", "load",
    "logit_lens", "patch", "path_patch", "plot", "score_heads", "series", "similarity_test", "span_knockout", "transplant",
    "written_answers",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"mechicl.{name}")
    raise AttributeError(f"module 'mechicl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
