"""The fast way of patching against the plain one, in every family, with pictures in the prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mechicl.analysis.patching.patch import patch
from mechicl.data import concepts
from mechicl.models.vlm import HookedVLM
from mechicl.prompts.corrupt import minimal_pairs
from mechicl.training.organisms import FAMILIES

Organism = Callable[..., tuple[Any, Any]]
QUIET: dict[str, Any] = {"progress": False, "n_permutations": 3}
SAME = 1e-5
"""float32 sums in another order, on logits of order one."""


@pytest.mark.parametrize("kind", FAMILIES)
def test_resumed_cells_equal_full_runs_in_every_family(kind: str, organism: Organism) -> None:
    model = HookedVLM(*organism(kind))
    pairs = minimal_pairs(model.renderer, concepts.draw(2, classes=2, shots=1, size=28, seed=3, syllables=(2, 2)), "swap_query", seed=1)
    last = model.cfg.n_layers - 1
    sites = ["resid_pre", "resid_post", "z", "q", "v", "pattern", "embed"] + (["image_features"] if model.family.image_tokens else [])
    sites += [s for s in ("resid_mid", "mlp_out", "attn_out") if f"blocks.{last - 1}.hook_{s}" in model.hook_dict]
    for by, metric in (("span", "label_logprob"), ("head", "logit_diff")):
        options = {**QUIET, "layers": [last - 1], "spans": ["right label", "query image", "last token"]}
        if model.family.image_tokens is False:
            options["spans"] = ["right label", "last token"]
        found = [patch(model, pairs, sites=sites, by=by, metric=metric, engine=engine, **options) for engine in ("naive", "resume")]  # type: ignore[arg-type]
        for site in sites:
            np.testing.assert_allclose(found[1][site].raw, found[0][site].raw, atol=SAME, err_msg=site)
            assert np.isfinite(found[1][site].raw[:, ~np.isnan(found[1][site].value)]).all()
