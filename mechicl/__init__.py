"""Mechanistic interpretability of in-context learning, in toy transformers and in vision-language models.

The names below load what they need when they are first used, so that `import mechicl` costs what Python costs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechicl.analysis.ablation import ablate, dose_curve
    from mechicl.analysis.anchored import compare_strategies
    from mechicl.analysis.attribution import attribute
    from mechicl.analysis.circuit_overlap import compare_circuits
    from mechicl.analysis.circuits import circuit_curve, evaluate_circuit, find_circuit
    from mechicl.analysis.direct_logits import direct_logits
    from mechicl.analysis.edge_attribution import eap
    from mechicl.analysis.factors import factor_shares
    from mechicl.analysis.function_vector_effects import add_function_vector
    from mechicl.analysis.function_vectors import function_vector, function_vector_scores
    from mechicl.analysis.head_circuits import head_circuits
    from mechicl.analysis.heads import attention_by_role, score_heads
    from mechicl.analysis.icl import icl_accuracy
    from mechicl.analysis.kv_shift import kv_shift
    from mechicl.analysis.link_eval import evaluate_link
    from mechicl.analysis.link_prior import informative_position, label_corruption
    from mechicl.analysis.link_rename import link_or_prior
    from mechicl.analysis.logit_lens import logit_lens
    from mechicl.analysis.margin import contrast_margin
    from mechicl.analysis.patching import patch
    from mechicl.analysis.paths import path_patch
    from mechicl.analysis.similarity import similarity_test
    from mechicl.analysis.span_knockouts import span_knockout
    from mechicl.analysis.study import find_and_prove
    from mechicl.analysis.transplant import transplant
    from mechicl.models.load import load
    from mechicl.models.vlm import HookedVLM
    from mechicl.prompts.episode import Episode, Shot
    from mechicl.training.adapt import adapt
    from mechicl.views.plots import plot

__version__ = "0.1.0"

_HOMES = {
    "adapt": "mechicl.training.adapt",
    "compare_strategies": "mechicl.analysis.anchored",
    "compare_circuits": "mechicl.analysis.circuit_overlap",
    "circuit_curve": "mechicl.analysis.circuits",
    "evaluate_circuit": "mechicl.analysis.circuits",
    "find_circuit": "mechicl.analysis.circuits",
    "contrast_margin": "mechicl.analysis.margin",
    "load": "mechicl.models.load",
    "HookedVLM": "mechicl.models.vlm",
    "Episode": "mechicl.prompts.episode",
    "Shot": "mechicl.prompts.episode",
    "score_heads": "mechicl.analysis.heads",
    "attention_by_role": "mechicl.analysis.heads",
    "icl_accuracy": "mechicl.analysis.icl",
    "ablate": "mechicl.analysis.ablation",
    "dose_curve": "mechicl.analysis.ablation",
    "attribute": "mechicl.analysis.attribution",
    "eap": "mechicl.analysis.edge_attribution",
    "factor_shares": "mechicl.analysis.factors",
    "function_vector_scores": "mechicl.analysis.function_vectors",
    "function_vector": "mechicl.analysis.function_vectors",
    "add_function_vector": "mechicl.analysis.function_vector_effects",
    "direct_logits": "mechicl.analysis.direct_logits",
    "evaluate_link": "mechicl.analysis.link_eval",
    "informative_position": "mechicl.analysis.link_prior",
    "label_corruption": "mechicl.analysis.link_prior",
    "link_or_prior": "mechicl.analysis.link_rename",
    "logit_lens": "mechicl.analysis.logit_lens",
    "head_circuits": "mechicl.analysis.head_circuits",
    "find_and_prove": "mechicl.analysis.study",
    "kv_shift": "mechicl.analysis.kv_shift",
    "patch": "mechicl.analysis.patching",
    "path_patch": "mechicl.analysis.paths",
    "similarity_test": "mechicl.analysis.similarity",
    "span_knockout": "mechicl.analysis.span_knockouts",
    "transplant": "mechicl.analysis.transplant",
    "plot": "mechicl.views.plots",
}
_MODULES = ("data", "prompts", "models", "analysis", "training", "views", "errors", "results")

__all__ = [
    "Episode", "HookedVLM", "Shot", "ablate", "adapt", "add_function_vector", "attention_by_role", "attribute", "circuit_curve",
    "compare_circuits", "compare_strategies", "contrast_margin", "direct_logits", "dose_curve", "eap", "evaluate_circuit",
    "evaluate_link", "factor_shares", "find_and_prove", "find_circuit", "function_vector", "function_vector_scores",
    "head_circuits", "icl_accuracy", "informative_position", "kv_shift", "label_corruption", "link_or_prior", "load",
    "logit_lens", "patch", "path_patch", "plot", "score_heads", "similarity_test", "span_knockout", "transplant",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"mechicl.{name}")
    raise AttributeError(f"module 'mechicl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
