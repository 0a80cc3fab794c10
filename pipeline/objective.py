r"""Surrogate objectives, each as the coefficients of the score function.

Every policy gradient here is a weighted sum of score functions,

    g = sum_{k,t} c_kt  grad log pi(x_kt | s_kt),        c constant in theta,

so an objective is the array c. ``owner`` says which prompt a rollout belongs to, K = rollouts of that prompt,
|k| = tokens of rollout k, rho_kt = exp(logp_new_kt - logp_old_kt), A = group advantage (``pipeline.advantages``).

    cropi      c = rho_kt A_k / (K |k|)                            arXiv:2510.26491, as released: unclipped, no KL
    cropi_is   c = w_k A_k / (|k| sum_j w_j), A with weighted group statistics, w clipped sequence weights
    rft        c = [R_k > 0] / (n_rewarded |k|)                    the released code's alternative loss
    grpo       c = rho_kt A_k / (K |k|) where the clipped surrogate has a gradient, else 0

Departures: (1) cropi_is is the default for influence. Per-token ratios correct only the current token; the clipped
sequence weights restore most of the rank correlation that the plain estimator loses as the policy moves.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from pipeline.advantages import group_advantages, sequence_weights, weighted_group_advantages

Coefficients = Float[np.ndarray, "rollouts tokens"]


def cropi(
    logp_new: Float[np.ndarray, "rollouts tokens"],
    logp_old: Float[np.ndarray, "rollouts tokens"],
    mask: Bool[np.ndarray, "rollouts tokens"],
    rewards: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
) -> Coefficients:
    """Return c of the published off-policy estimator: per-token ratio, plain group statistics."""
    scale = group_advantages(rewards, owner) / (_group_sum(np.ones(len(owner)), owner) * _lengths(mask))
    return _ratio(logp_new, logp_old, mask) * scale[:, None]


def cropi_is(
    logp_new: Float[np.ndarray, "rollouts tokens"],
    logp_old: Float[np.ndarray, "rollouts tokens"],
    mask: Bool[np.ndarray, "rollouts tokens"],
    rewards: Float[np.ndarray, " rollouts"],
    owner: Int[np.ndarray, " rollouts"],
) -> Coefficients:
    """Return c with clipped, self-normalised sequence importance weights."""
    w = sequence_weights(np.where(mask, logp_new - logp_old, 0.0).sum(1))
    a = weighted_group_advantages(rewards, w, owner)
    return (w * a / (_group_sum(w, owner) * _lengths(mask)))[:, None] * mask


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


def grpo(
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
    a = group_advantages(rewards, owner)[:, None]
    clipped = ((a > 0) & (rho > 1 + clip)) | ((a < 0) & (rho < 1 - clip))
    return cropi(logp_new, logp_old, mask, rewards, owner) * ~clipped


OBJECTIVES: dict[str, Callable[..., Coefficients]] = {"cropi": cropi, "cropi_is": cropi_is, "rft": rft, "grpo": grpo}


def _ratio(logp_new: np.ndarray, logp_old: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.exp(np.where(mask, logp_new - logp_old, 0.0)) * mask


def _lengths(mask: np.ndarray) -> np.ndarray:
    return np.maximum(mask.sum(1), 1)  # an empty completion has no coefficient to divide


def _group_sum(values: np.ndarray, owner: np.ndarray) -> np.ndarray:
    _, group = np.unique(owner, return_inverse=True)
    return np.bincount(group, weights=values)[group]
