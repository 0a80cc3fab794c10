r"""Alignment of prompts with targets, and the fusion of several targets into one order.

CROPI, arXiv:2510.26491, as released (``inf_valid_uniform``).

    c_ij = <z_i, v_j> / (|z_i| |v_j|)
    F_i  = sum over { j : r_ij <= n } of 1 / r_ij        r_ij = rank of i for target j, best first; n = budget

Example: ranks {1, 40} fuse to 1.025, {2, 2} to 1.0, {3} to 0.333.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

BLOCK = 1 << 16  # prompts at a time


def cosine(
    features: Float[np.ndarray, "prompts dim"], targets: Float[np.ndarray, "targets dim"]
) -> Float[np.ndarray, "prompts targets"]:
    """Return the cosine of each feature row with each target row.

    Raises:
        ValueError: a row has no direction (all zeros) or is not finite; the message names it.
    """
    return _unit(features, "features") @ _unit(targets, "targets").T


def mean_gradient(
    unit_rows: Float[np.ndarray, "prompts dim"], norms: Float[np.ndarray, " prompts"], *, size: int
) -> Float[np.ndarray, " dim"]:
    """Return the mean, not normalised, gradient of a validation set of ``size`` prompts.

    Prompts without signal have a zero gradient and no stored row; they still count in the mean.
    """
    if size < len(unit_rows) or size == 0:
        raise ValueError(f"size = {size}: a validation set cannot be smaller than its {len(unit_rows)} stored rows")
    return (unit_rows * norms[:, None]).sum(axis=0, dtype=np.float64).astype(np.float32) / size


def fuse_ranks(scores: Float[np.ndarray, "prompts targets"], budget: int) -> Float[np.ndarray, " prompts"]:
    """Return the fused score F of each prompt; ties within a target are ranked by row.

    Args:
        scores: higher is better.
        budget: n, the length of each target's list; ranks beyond it add nothing.
    """
    if budget < 0:
        raise ValueError(f"budget = {budget}: must not be negative")
    ranks, out = np.empty(scores.shape, np.int32), np.empty(len(scores))
    for target in range(scores.shape[1]):  # one at a time, and rows in blocks: a pool may have 1e7 prompts
        ranks[np.argsort(-scores[:, target], kind="stable"), target] = np.arange(1, len(scores) + 1, dtype=np.int32)
    for start in range(0, len(scores), BLOCK):
        block = ranks[start : start + BLOCK]
        out[start : start + BLOCK] = np.where(block <= budget, 1.0 / block, 0.0).sum(axis=1)
    return out


def _unit(rows: np.ndarray, name: str) -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float32)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if bad.size:
        raise ValueError(f"{name}: {bad.size} row(s) are zero or not finite, first row {bad[0]}; leave them out")
    return (rows / norms[:, None]).astype(np.float32)
