r"""Online GRPO on a stage, with the batch chosen from live beliefs and the step weighted by alignment.

    g = 1/B sum_p W_p g_p                 g_p  policy gradient of prompt p (``pipeline.gradients``), B = prompts a batch
    theta <- theta + AdamW(clip(g)),      W    DIEM weights (``pipeline.reweight``), 1 without a reference gradient

The policy that samples is the policy that is updated, one update a batch, so the ratio to the sampler is one up to
rounding. Prompts whose rewards agree have g_p = 0: they count in B and cost no backward pass. The step size warms up,
because Adam's first steps are sign steps, and decays linearly to a tenth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from pipeline.advantages import has_signal
from pipeline.beliefs import update
from pipeline.features import sketch_gradients
from pipeline.optimization import Optimization
from pipeline.policy import Policy
from pipeline.records import Prompts, Rollouts
from pipeline.reference import Reference
from pipeline.sampling import best_of_candidates, shuffle
from pipeline.weighted import WAYS, plain

ONLINE = "grpo_clipped"


@dataclass(frozen=True)
class Batches:
    """How batches are drawn: ``sampler`` is ``shuffle`` or ``insight``; the rest is that of ``pipeline.sampling``."""

    sampler: str
    batch: int
    rollouts: int
    discount: float
    mu: float
    eta: float
    candidates: int
    seed: int


@dataclass(frozen=True)
class Step:
    """What one optimizer step did: its rollouts, the weight of each prompt, and numbers for the log."""

    rollouts: Rollouts
    weights: dict[str, float]
    metrics: dict[str, Any]


def train(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    prompts: Prompts,
    belief: tuple[Float[np.ndarray, " prompts"], Float[np.ndarray, " prompts"]],
    roll: Callable[[Prompts, int], Rollouts],
    *,
    first: int,
    steps: int,
    stage_start: int,
    optimization: Optimization,
    batches: Batches,
    reference: Reference | None,
) -> Iterator[Step]:
    """Take ``steps`` optimizer steps on ``prompts``, yielding after each.

    Args:
        policy: updated in place.
        optimizer: over ``policy.trainable()``; see ``make_optimizer``.
        prompts: the stage.
        belief: alpha and beta of each prompt before the first step.
        roll: samples and scores the rollouts of some prompts at a step; see ``pipeline.rollouts.collect``.
        first: number of optimizer steps that the run has already taken.
        steps: how many to take.
        stage_start: the run's step at which this stage began; keys the order of its batches.
        optimization: step size and its like.
        batches: how batches are drawn.
        reference: what DIEM aligns with; None is plain GRPO.

    Raises:
        FloatingPointError: the gradient is not finite; the message names the step and a prompt.
    """
    alpha, beta = (np.array(column, float) for column in belief)
    for step in range(first, first + steps):
        rows = _choose(prompts, alpha, beta, step - stage_start, batches)
        began = time.perf_counter()
        rollouts = roll(prompts.take(rows), step)
        sampled = time.perf_counter()
        counts = _counts(rollouts)
        s, f = (np.array([counts.get(uid, (0, 0))[i] for uid in prompts.prompt_uid], float) for i in (0, 1))
        alpha, beta = update(alpha, beta, s, f, discount=batches.discount)
        weights, facts = _updates(policy, optimizer, rollouts, step, optimization, reference)
        facts |= {
            "step": step + 1,
            "reward": float(np.mean(rollouts.reward)),
            "seconds_rollouts": sampled - began,
            "seconds_update": time.perf_counter() - sampled,
        }
        yield Step(rollouts, weights, facts)


def _choose(prompts: Prompts, alpha: np.ndarray, beta: np.ndarray, step: int, batches: Batches) -> list[int]:
    size = min(batches.batch, len(prompts))
    if batches.sampler == "shuffle":
        return shuffle(prompts.prompt_uid, step, batch=size, seed=batches.seed)
    return best_of_candidates(
        prompts.prompt_uid,
        alpha,
        beta,
        step,
        batch=size,
        rollouts=batches.rollouts,
        seed=batches.seed,
        mu=batches.mu,
        eta=batches.eta,
        candidates=batches.candidates,
    )


def _counts(rollouts: Rollouts) -> dict[str, tuple[int, ...]]:
    return {
        uid: tuple(sum(rollouts.verdict[i] == verdict for i in rows) for verdict in ("correct", "incorrect"))
        for uid, rows in rollouts.groups().items()
    }


def _updates(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    step: int,
    optimization: Optimization,
    reference: Reference | None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Update once a minibatch; facts are means over the updates."""
    uids, groups = list(rollouts.groups()), rollouts.groups()
    size = optimization.minibatch or len(uids)
    if reference is not None and reference.source == "rollout_batch":
        reference.direction = _features(policy, rollouts, optimization, reference).sum(axis=0)
    weights: dict[str, float] = {}
    told = []
    for start in range(0, len(uids), size):
        part = rollouts.take([i for uid in uids[start : start + size] for i in groups[uid]])
        used, facts = _update(policy, optimizer, part, len(uids[start : start + size]), step, optimization, reference)
        weights |= used
        told.append(facts)
    if len(told) == 1:
        return weights, told[0]
    names = dict.fromkeys(name for facts in told for name in facts)
    return weights, {name: float(np.mean([facts[name] for facts in told if name in facts])) for name in names}


def _features(policy: Policy, rollouts: Rollouts, optimization: Optimization, reference: Reference) -> np.ndarray:
    scope = reference.block[1] if reference.block else None
    return sketch_gradients(
        policy, rollouts, ONLINE, reference.projection, micro_tokens=optimization.micro_tokens, scope=scope
    )[1]


def _update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    size: int,
    step: int,
    optimization: Optimization,
    reference: Reference | None,
) -> tuple[dict[str, float], dict[str, Any]]:
    groups = rollouts.groups()
    rows_of = [rows for rows in groups.values() if has_signal(np.array([rollouts.reward[r] for r in rows]))]
    facts: dict[str, Any] = {"lr": optimization.lr_at(step), "signal": 0.0, "gradient_norm": 0.0, "clipped": False}
    if not rows_of:
        return dict.fromkeys(groups, 1.0), facts
    live = rollouts.take([i for rows in rows_of for i in rows])
    used: list[np.ndarray] = []

    def weigh(features: np.ndarray) -> np.ndarray:
        assert reference is not None
        weights, diagnostics = reference.weigh(features, step, longest=optimization.clip_norm * size)
        used.append(weights)
        facts.update({f"diem_{name}": value for name, value in asdict(diagnostics).items()})
        return weights

    if reference is None:
        plain(policy, live, ONLINE, micro_tokens=optimization.micro_tokens)
    else:
        way = WAYS[reference.way]
        way(policy, live, ONLINE, weigh=weigh, micro_tokens=optimization.micro_tokens, **reference.options)
    for parameter in policy.trainable().values():
        if parameter.grad is not None:
            parameter.grad.div_(-size)
    norm = float(torch.nn.utils.clip_grad_norm_(list(policy.trainable().values()), optimization.clip_norm))
    if not np.isfinite(norm):
        raise FloatingPointError(
            f"step {step + 1}: the gradient norm is {norm}; prompts of the batch: {list(groups)[:3]}..."
        )
    for group in optimizer.param_groups:
        group["lr"] = facts["lr"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    facts |= {"signal": len(rows_of) / size, "gradient_norm": norm, "clipped": norm > optimization.clip_norm}
    weights = used[0].tolist() if used else [1.0] * len(rows_of)
    return dict.fromkeys(groups, 1.0) | dict(zip(live.groups(), weights, strict=True)), facts
