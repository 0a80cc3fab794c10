r"""Agreement of scores with effects by rank, and how much of a score is signal.

    rho = corr(rank x, rank y)                 Spearman 1904; ties share the mean of their ranks
    R   = 2 rho_halves / (1 + rho_halves)      Spearman-Brown 1910: reliability of the whole from that of its halves

The interval is the percentile bootstrap over prompts, both columns resampled together. A column without variance has
no rank order: rho is None, not zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

RESAMPLES = 2000


def rank_agreement(
    scores: Float[np.ndarray, " prompts"],
    effects: Float[np.ndarray, " prompts"],
    *,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return ``rho``, the ends ``low`` and ``high`` of its interval, and ``n``, the number of prompts.

    Args:
        scores: one number a prompt.
        effects: what the scores should order.
        level: of the interval.
        seed: of the resamples; equal seeds and sizes draw equal resamples, so that scorers are compared on the same.

    Raises:
        ValueError: the columns differ in length, or hold a value that is not finite.
    """
    x, y = np.asarray(scores, float), np.asarray(effects, float)
    if x.shape != y.shape:
        raise ValueError(f"scores has {len(x)} values but effects has {len(y)}: give one of each a prompt")
    bad = np.flatnonzero(~np.isfinite(x) | ~np.isfinite(y))
    if bad.size:
        raise ValueError(f"row {bad[0]}: score {x[bad[0]]}, effect {y[bad[0]]}; leave out what has no finite value")
    n = len(x)
    rho = float(_rho(x[None], y[None])[0]) if n > 1 else np.nan
    if not np.isfinite(rho):
        return {"rho": None, "low": None, "high": None, "n": n}
    drawn = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    resampled = _rho(x[drawn], y[drawn])
    low, high = np.nanquantile(resampled, [0.5 - level / 2, 0.5 + level / 2])  # a resample may be all one tie
    return {"rho": rho, "low": float(low), "high": float(high), "n": n}


def reliability(
    first: Float[np.ndarray, " prompts"], second: Float[np.ndarray, " prompts"]
) -> dict[str, float | int | None]:
    """Return ``halves``, the rank agreement of scores from two halves of the rollouts, and ``whole``, R.

    R is the rank agreement to expect of the score from all rollouts with the same from as many others. A negative
    agreement of the halves has no such reading and leaves R at None.
    """
    found = rank_agreement(first, second)
    rho = found["rho"]
    whole = None if rho is None or rho <= -1 or rho < 0 else 2 * rho / (1 + rho)
    return {"halves": rho, "low": found["low"], "high": found["high"], "whole": whole, "n": found["n"]}


def _rho(x: Float[np.ndarray, "samples prompts"], y: Float[np.ndarray, "samples prompts"]) -> np.ndarray:
    a, b = rankdata(x, axis=1), rankdata(y, axis=1)
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.divide((a * b).sum(axis=1), scale, out=np.full(len(a), np.nan), where=scale > 0)
