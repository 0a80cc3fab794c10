r"""Group-relative advantages and importance ratios.

CROPI, arXiv:2510.26491, as released; GRPO's group baseline; the leave-one-out baseline of Kool et al. 2019.

    A_k   = (R_k - mean_j R_j) / (std_j R_j + 1e-4)             std unbiased (ddof = 1)
    w_k   = min(exp(sum_t logp_new_kt - logp_old_kt), c)        clipped sequence importance weight
    A^w_k = (R_k - mean_w) / (std_w + 1e-4)                     mean_w = sum_k w_k R_k / sum_k w_k
                                                                std_w^2 = sum_k w_k (R_k - mean_w)^2 / sum_k w_k
    R_k - b_k                                                   b_k = mean_w over the group without k
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

EPSILON = 1e-4  # as released; keeps a group without variance at exactly zero advantage


def group_advantages(
    rewards: Float[np.ndarray, " rollouts"], owner: Int[np.ndarray, " rollouts"]
) -> Float[np.ndarray, " rollouts"]:
    """Return A within each group; a group of one, or one whose rewards agree, has advantage zero."""
    out = np.zeros(len(rewards))
    for rows in _groups(owner):
        r = rewards[rows]
        if len(r) > 1:
            out[rows] = (r - r.mean()) / (r.std(ddof=1) + EPSILON)
    return out


def weighted_group_advantages(
    rewards: Float[np.ndarray, " rollouts"],
    weights: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
    *,
    baseline_weights: Float[np.ndarray, " rollouts"] | None = None,
) -> Float[np.ndarray, " rollouts"]:
    """Return A with importance-weighted group statistics (the released code's ``reweight_group_adv``).

    ``baseline_weights`` weigh the mean that is taken from the rewards, where they are not ``weights`` themselves.
    """
    out = np.zeros(len(rewards))
    for rows in _groups(owner):
        r, w = rewards[rows], weights[rows]
        mean = np.average(r, weights=w)
        baseline = mean if baseline_weights is None else np.average(r, weights=baseline_weights[rows])
        out[rows] = (r - baseline) / (np.sqrt(np.average((r - mean) ** 2, weights=w)) + EPSILON)
    return out


def leave_one_out_advantages(
    rewards: Float[np.ndarray, " rollouts"],
    weights: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
) -> Float[np.ndarray, " rollouts"]:
    """Return R_k - b_k, whose baseline does not depend on rollout k; a group of one has advantage zero."""
    out = np.zeros(len(rewards))
    for rows in _groups(owner):
        for k in rows if len(rows) > 1 else ():
            others = rows[rows != k]
            weight = weights[others] if weights[others].any() else np.ones(len(others))  # all weight sits on k
            out[k] = rewards[k] - np.average(rewards[others], weights=weight)
    return out


def sequence_weights(log_ratio: Float[np.ndarray, " rollouts"], *, clip: float = 5.0) -> Float[np.ndarray, " rollouts"]:
    """Return w, the likelihood ratio of whole completions, clipped from above.

    Args:
        log_ratio: sum over tokens of logp_new - logp_old.
        clip: c; bounds the variance at the price of a bias toward the sampling policy.
    """
    return np.exp(np.minimum(log_ratio, np.log(clip)))


def relative_weights(
    log_ratio: Float[np.ndarray, " rollouts"], owner: Int[np.ndarray, " rollouts"], *, clip: float = np.inf
) -> Float[np.ndarray, " rollouts"]:
    """Return min(exp(log_ratio), clip) over the largest such weight of the group, in (0, 1].

    For everything that divides by the group's sum of weights. Long completions underflow on their own, all at once;
    relative to each other they do not.
    """
    out = np.minimum(log_ratio, np.log(clip))
    for rows in _groups(owner):
        out[rows] -= out[rows].max()
    return np.exp(out)


def effective_sample_size(weights: Float[np.ndarray, " n"]) -> float:
    """Return Kish's (sum w)^2 / sum w^2; zero for an empty or all-zero array."""
    total, square = float(np.sum(weights)), float(np.sum(np.square(weights)))
    return total * total / square if square > 0 else 0.0


def has_signal(rewards: Float[np.ndarray, " rollouts"]) -> bool:
    """Return whether a group's rewards differ, without which its policy gradient is zero."""
    return len(rewards) > 1 and float(np.max(rewards)) > float(np.min(rewards))


def _groups(owner: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(owner == g) for g in np.unique(owner)]
