"""Standardised effects of paired differences: how large, in units of their own spread, with an interval."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mechicl.analysis.statistics import N_BOOTSTRAP


@dataclass(frozen=True, eq=False)
class Effect:
    """Standardised paired differences, with bootstrap interval; arrays of one shape."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def paired_effect(change: Float[np.ndarray, "batch ..."], *, seed: int = 0, tie: float = 0.0, n_draws: int = N_BOOTSTRAP) -> Effect:
    """Hedges' g of paired differences: their mean over their standard deviation, times 1 - 3 / (4 (n - 1) - 1) for small n.

    About 0.2 is called small, 0.5 medium, 0.8 large (Cohen).

    Args:
        change: One difference per episode; NaN where an episode does not count.
        seed: Decides the resampling.
        tie: Differences no larger than this count as none.
        n_draws: Resamples of the episodes.

    Returns:
        Value and 95 % percentile interval; 0 where nothing differs, NaN with fewer than two episodes or where all differ by the very same amount.
    """
    array = np.asarray(change, dtype=np.float64)
    n, shape = len(array), array.shape[1:]
    flat = np.where(np.abs(array) <= tie, 0.0, array).reshape(n, -1)
    value = _hedges(np.ones((1, n)), flat)[0]
    draws = _hedges(np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_draws).astype(np.float64), flat)
    low, high = np.full(flat.shape[1], np.nan), np.full(flat.shape[1], np.nan)
    alive = ~np.isnan(draws).all(0)
    if alive.any():
        low[alive], high[alive] = np.nanquantile(draws[:, alive], (0.025, 0.975), axis=0)
    return Effect(value.reshape(shape), low.reshape(shape), high.reshape(shape))


def _hedges(counts: np.ndarray, flat: np.ndarray) -> np.ndarray:
    """[draw, cell] from how often each episode is drawn [draw, batch]."""
    known = ~np.isnan(flat)
    values = np.where(known, flat, 0.0)
    n = counts @ known
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (counts @ values) / n
        spread = np.sqrt(np.maximum((counts @ values**2) / n - mean**2, 0) * n / (n - 1))
        # differences that are all the same up to rounding have no spread to be measured by
        spread = np.where(spread <= 1e-9 * np.abs(mean), 0.0, spread)
        found = mean / spread * (1 - 3 / (4 * (n - 1) - 1))
    return np.where(n < 2, np.nan, np.where((mean == 0) & (spread == 0), 0.0, np.where(spread == 0, np.nan, found)))
