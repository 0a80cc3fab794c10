r"""How far a prompt's stored rollouts are from the policy as it is now, from log-probabilities that are at hand.

    l_k = sum_t (logp_new_kt - logp_old_kt),   w_k = min(exp(l_k), 5)           ``pipeline.advantages``

    effective      (sum_k w_k)^2 / sum_k w_k^2                                  Kish's effective sample size [rollouts]
    ess            effective / K                                                its share of the prompt's K rollouts
    log_ratio_max, log_ratio_p99                                                of |logp_new_kt - logp_old_kt| [nats]
    lost           - mean_k l_k                                                 log-probability lost [nats a rollout]

Effective rollouts compare the weights with each other. Completions that have all become equally unlikely still weigh
alike, and only ``lost`` tells: read the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from pipeline.advantages import effective_sample_size, relative_weights
from pipeline.objective import CLIP
from pipeline.packing import pack, packed_logps, passes
from pipeline.policy import Policy
from pipeline.records import Rollouts


@dataclass(frozen=True)
class Staleness:
    """What is left of the evidence, one value a prompt, in increasing order of ``owner``.

    Attributes:
        owner: the prompts.
        rollouts: K, stored rollouts of each.
        effective: how many of them still count.
        ess: the same as a share of K.
        log_ratio_max: largest |log ratio| of a token [nats]; 0 where no rollout has a token.
        log_ratio_p99: .99 quantile of the same.
        lost: mean log-probability that a rollout has lost since it was sampled [nats].
    """

    owner: Int[np.ndarray, " prompts"]
    rollouts: Int[np.ndarray, " prompts"]
    effective: Float[np.ndarray, " prompts"]
    ess: Float[np.ndarray, " prompts"]
    log_ratio_max: Float[np.ndarray, " prompts"]
    log_ratio_p99: Float[np.ndarray, " prompts"]
    lost: Float[np.ndarray, " prompts"]


def staleness(
    logp_new: Float[np.ndarray, "rollouts tokens"],
    logp_old: Float[np.ndarray, "rollouts tokens"],
    mask: Bool[np.ndarray, "rollouts tokens"],
    owner: Int[np.ndarray, " rollouts"],
) -> Staleness:
    """Describe the evidence of each prompt; the arrays are those that an objective takes.

    Raises:
        ValueError: a log-probability of a token is not finite.
    """
    log_ratio = np.where(mask, logp_new - logp_old, 0.0)
    broken = np.flatnonzero(~np.isfinite(log_ratio).all(axis=1))
    if broken.size:
        raise ValueError(
            f"rollout {broken[0]} of prompt {owner[broken[0]]} has a log-probability that is not finite: the policy "
            "has diverged, or the rollout was stored with NaN; leave it out"
        )
    total = log_ratio.sum(1)
    weights = relative_weights(total, owner, clip=CLIP)
    prompts = np.unique(owner)
    members = [np.flatnonzero(owner == p) for p in prompts]
    tokens = [np.abs(log_ratio[rows][mask[rows]]) for rows in members]
    count = np.array([len(rows) for rows in members], int)
    effective = np.array([effective_sample_size(weights[rows]) for rows in members])
    return Staleness(
        owner=prompts,
        rollouts=count,
        effective=effective,
        ess=effective / count,
        log_ratio_max=np.array([x.max(initial=0.0) for x in tokens]),
        log_ratio_p99=np.array([float(np.quantile(x, 0.99)) if x.size else 0.0 for x in tokens]),
        lost=np.array([-total[rows].mean() for rows in members]),
    )


def of_rollouts(rollouts: Rollouts, logp_new: Float[np.ndarray, "rollouts tokens"]) -> tuple[list[str], Staleness]:
    """Describe stored rollouts, given the log-probability of each completion token under the policy as it is now.

    A gradient pass makes these anyway, see ``watch`` of ``pipeline.features.sketch_gradients``. Returns the
    prompt_uids, in order of first appearance, and one value for each.
    """
    uids = list(rollouts.groups())
    old, mask = np.zeros(logp_new.shape), np.zeros(logp_new.shape, bool)
    for i, logp in enumerate(rollouts.logp_old):
        old[i, : len(logp)], mask[i, : len(logp)] = logp, True
    number = {uid: i for i, uid in enumerate(uids)}
    owner = np.array([number[uid] for uid in rollouts.prompt_uid], int)
    return uids, staleness(logp_new.astype(float), old, mask, owner)


@torch.no_grad()
def measure(policy: Policy, rollouts: Rollouts, *, micro_tokens: int = 65_536) -> tuple[list[str], Staleness]:
    """Describe stored rollouts by a forward pass: for a decision that comes before any gradient.

    Args:
        policy: the policy as it is now.
        rollouts: stored rollouts, each with the log-probabilities under the policy that sampled it.
        micro_tokens: most tokens in one forward pass.

    Returns:
        The prompt_uids, in order of first appearance, and one value for each.
    """
    new = np.zeros((len(rollouts), max((len(x) for x in rollouts.logp_old), default=0)))
    for parts in passes(pack(rollouts), micro_tokens):
        for rows in parts:
            found = packed_logps(policy, rollouts, rows).cpu().numpy()
            new[[i for row in rows for i in row.rollouts], : found.shape[1]] = found
    return of_rollouts(rollouts, new)


def stale(effective: Mapping[str, float], least: float) -> list[str]:
    """Return the prompt_uids with fewer than ``least`` effective rollouts, the poorest first, ties by prompt_uid.

    Args:
        effective: effective rollouts of each prompt.
        least: how many a prompt needs; 0 calls none stale.
    """
    if least < 0:
        raise ValueError(f"least = {least}: a number of rollouts, 0 or more; 0 calls no prompt stale")
    return sorted((uid for uid, n in effective.items() if n < least), key=lambda uid: (effective[uid], uid))
