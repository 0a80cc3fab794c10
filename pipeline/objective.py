r"""Surrogate objectives, each as the coefficients of the score function.

Every policy gradient here is a weighted sum of score functions,

    g = sum_{k,t} c_kt  grad log pi(x_kt | s_kt),        c constant in theta,

so an objective is the array c. ``owner`` says which prompt a rollout belongs to, K = rollouts of that prompt,
|k| = tokens of rollout k, rho_kt = exp(logp_new_kt - logp_old_kt), A_k = group advantage, w_k = min(prod_t rho_kt, 5)
the clipped sequence weight, A^u_k = advantage with group statistics weighted by u (``pipeline.advantages``).

    grpo                 c = rho_kt A_k / (K |k|)                arXiv:2510.26491 (CROPI) as run: unclipped, no KL
    grpo_weighted_group  c = rho_kt A^q_k / (K |k|)              its option: q_k = exp(mean_t log rho_kt)
    rft                  c = [R_k > 0] / (n_rewarded |k|)        its alternative loss
    grpo_sequence        c = w_k A^w_k / (|k| sum_j w_j)         sequence weights throughout
    grpo_optimal_baseline  the same with b in the place of mean_w: the default for influence
                         b = sum_k w_k m_k R_k / sum_k w_k m_k,  m_k = sum_t (1 - exp(logp_new_kt))^2 / |k|^2
    grpo_clipped         as grpo, and 0 where the clipped surrogate is flat: what a step of training uses
    reinforce            c = w_k (R_k - b_k) / K,  b_k = sum_{j != k} w_j R_j / sum_{j != k} w_j

``reinforce`` divides neither by a deviation nor by a length: as long as no ratio reaches the clip, its expectation is
the gradient of the expected reward. The others weigh prompts by 1/std and rollouts by 1/|k|, on purpose or by custom.
Any constant may be taken from the rewards; the one that leaves the least variance is E[|s|^2 R] / E[|s|^2] with s the
score function of a rollout (Greensmith et al. 2004, section 4). m stands for |s|^2: the squared share of the sampled
logit in the gradient of log pi by the logits, which the log-probability tells.
Departures: (1) grpo_sequence. A per-token ratio corrects the current token only, not the reward that the rest of the
completion earned; sequence weights correct both, and self-normalising bounds their variance. (2) b weighs with w where
the least variance under the sampler asks for w^2: one large ratio would decide the baseline.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from pipeline.advantages import (
    group_advantages,
    leave_one_out_advantages,
    relative_weights,
    sequence_weights,
    weighted_group_advantages,
)

Coefficients = Float[np.ndarray, "rollouts tokens"]


def grpo(
    logp_new: Float[np.ndarray, "rollouts tokens"],
    logp_old: Float[np.ndarray, "rollouts tokens"],
    mask: Bool[np.ndarray, "rollouts tokens"],
    rewards: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
) -> Coefficients:
    """Return c of CROPI's off-policy estimator: per-token ratio, plain group statistics."""
    return _per_token(logp_new, logp_old, mask, group_advantages(rewards, owner), owner)


def grpo_weighted_group(
    logp_new: Float[np.ndarray, "rollouts tokens"],
    logp_old: Float[np.ndarray, "rollouts tokens"],
    mask: Bool[np.ndarray, "rollouts tokens"],
    rewards: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
) -> Coefficients:
    """Return c of ``grpo`` with group statistics weighted by q, the geometric mean of a rollout's token ratios."""
    q = relative_weights(_log_ratio(logp_new, logp_old, mask).sum(1) / _lengths(mask), owner)
    return _per_token(logp_new, logp_old, mask, weighted_group_advantages(rewards, q, owner), owner)


def rft(
    logp_new: Float[np.ndarray, "rollouts tokens"],
    logp_old: Float[np.ndarray, "rollouts tokens"],
    mask: Bool[np.ndarray, "rollouts tokens"],
    rewards: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
) -> Coefficients:
    """Return c of the mean log-likelihood of the rewarded responses alone."""
    rewarded = (rewards > 0).astype(float)
    return (rewarded / (np.maximum(_group_sum(rewarded, owner), 1.0) * _lengths(mask)))[:, None] * mask


def grpo_sequence(
    logp_new: Float[np.ndarray, "rollouts tokens"],
    logp_old: Float[np.ndarray, "rollouts tokens"],
    mask: Bool[np.ndarray, "rollouts tokens"],
    rewards: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
) -> Coefficients:
    """Return c with clipped, self-normalised sequence importance weights."""
    w = relative_weights(_log_ratio(logp_new, logp_old, mask).sum(1), owner, clip=CLIP)
    a = weighted_group_advantages(rewards, w, owner)
    return _per_sequence(w, a, mask, owner)


def grpo_optimal_baseline(
    logp_new: Float[np.ndarray, "rollouts tokens"],
    logp_old: Float[np.ndarray, "rollouts tokens"],
    mask: Bool[np.ndarray, "rollouts tokens"],
    rewards: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
) -> Coefficients:
    """Return c of ``grpo_sequence`` with the baseline of least variance: rollouts with a large gradient decide it."""
    w = relative_weights(_log_ratio(logp_new, logp_old, mask).sum(1), owner, clip=CLIP)
    surprise = np.where(mask, 1.0 - np.exp(np.where(mask, logp_new, 0.0)), 0.0)
    m = np.maximum((surprise**2).sum(1) / _lengths(mask) ** 2, 1e-12)  # where all is certain, the group's mean
    a = weighted_group_advantages(rewards, w, owner, baseline_weights=w * m)
    return _per_sequence(w, a, mask, owner)


def grpo_clipped(
    logp_new: Float[np.ndarray, "rollouts tokens"],
    logp_old: Float[np.ndarray, "rollouts tokens"],
    mask: Bool[np.ndarray, "rollouts tokens"],
    rewards: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
    *,
    clip: float = 0.2,
) -> Coefficients:
    """Return c of the clipped GRPO surrogate: zero where the ratio has left [1 - clip, 1 + clip] on the losing side."""
    rho = _ratio(logp_new, logp_old, mask)
    a = group_advantages(rewards, owner)
    clipped = ((a > 0)[:, None] & (rho > 1 + clip)) | ((a < 0)[:, None] & (rho < 1 - clip))
    return _per_token(logp_new, logp_old, mask, a, owner) * ~clipped


def reinforce(
    logp_new: Float[np.ndarray, "rollouts tokens"],
    logp_old: Float[np.ndarray, "rollouts tokens"],
    mask: Bool[np.ndarray, "rollouts tokens"],
    rewards: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
) -> Coefficients:
    """Return c of the plain estimator of the gradient of the expected reward; a group of one has none."""
    log_ratio = _log_ratio(logp_new, logp_old, mask).sum(1)
    a = leave_one_out_advantages(rewards, relative_weights(log_ratio, owner, clip=CLIP), owner)
    scale = sequence_weights(log_ratio, clip=CLIP) * a / _group_sum(np.ones(len(owner)), owner)
    return scale[:, None] * mask


CLIP = 5.0
"""The largest sequence weight."""

OBJECTIVES: dict[str, Callable[..., Coefficients]] = {
    "grpo": grpo,
    "grpo_weighted_group": grpo_weighted_group,
    "rft": rft,
    "grpo_sequence": grpo_sequence,
    "grpo_optimal_baseline": grpo_optimal_baseline,
    "grpo_clipped": grpo_clipped,
    "reinforce": reinforce,
}


def _per_token(
    logp_new: np.ndarray, logp_old: np.ndarray, mask: np.ndarray, advantages: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    scale = advantages / (_group_sum(np.ones(len(owner)), owner) * _lengths(mask))
    return _ratio(logp_new, logp_old, mask) * scale[:, None]


def _per_sequence(w: np.ndarray, advantages: np.ndarray, mask: np.ndarray, owner: np.ndarray) -> np.ndarray:
    return (w * advantages / (_group_sum(w, owner) * _lengths(mask)))[:, None] * mask


def _log_ratio(logp_new: np.ndarray, logp_old: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, logp_new - logp_old, 0.0)


def _ratio(logp_new: np.ndarray, logp_old: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.exp(_log_ratio(logp_new, logp_old, mask)) * mask


def _lengths(mask: np.ndarray) -> np.ndarray:
    return np.maximum(mask.sum(1), 1)  # an empty completion has no coefficient to divide


def _group_sum(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    _, group = np.unique(owner, return_inverse=True)
    return np.bincount(group, weights=values)[group]
