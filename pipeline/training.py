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
from torch import Tensor

from pipeline.advantages import has_signal
from pipeline.beliefs import update
from pipeline.gradients import prompt_gradients
from pipeline.policy import Policy
from pipeline.projection import SparseProjection
from pipeline.records import Prompts, Rollouts
from pipeline.reweight import Diagnostics, diagnose, diem_weights, temper
from pipeline.sampling import best_of_candidates, shuffle


@dataclass(frozen=True)
class Optimization:
    """How a run is optimized; the numbers that worked on the embedded default are those of its recipe.

    Attributes:
        total_steps: optimizer steps of the whole run, over which the step size decays.
        lr: peak step size.
        betas: AdamW's moments.
        warmup: steps of linear warm-up.
        final: share of ``lr`` that is left at the end.
        clip_norm: largest gradient norm.
        micro_tokens: most tokens in one backward pass.
    """

    total_steps: int
    lr: float
    betas: tuple[float, float]
    warmup: int
    final: float
    clip_norm: float
    micro_tokens: int

    def lr_at(self, step: int) -> float:
        """Return the step size of optimizer step ``step``, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        left = (self.total_steps - step) / max(1, self.total_steps - self.warmup)
        return self.lr * max(self.final, self.final + (1 - self.final) * left)


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
class Reference:
    """A reference gradient for DIEM, in the space of a projection.

    Attributes:
        direction: mean validation gradient, projected; (dim,).
        projection: the projection it went through; the batch goes through the same.
        ridge: damping of the Gram matrix, relative to its mean diagonal.
        strength: share of the weights that is mixed with one.
    """

    direction: Float[np.ndarray, " dim"]
    projection: SparseProjection
    ridge: float
    strength: float


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
        weights, facts = _update(policy, optimizer, rollouts, len(rows), step, optimization, reference)
        facts |= {
            "step": step + 1,
            "reward": float(np.mean(rollouts.reward)),
            "seconds_rollouts": sampled - began,
            "seconds_update": time.perf_counter() - sampled,
        }
        yield Step(rollouts, weights, facts)


def make_optimizer(policy: Policy, optimization: Optimization, state: dict[str, Tensor] | None = None) -> Any:
    """Return AdamW over the trainable parameters, with the moments of ``state`` where they are given."""
    parameters = policy.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=optimization.lr, betas=optimization.betas, weight_decay=0.0)
    for name, parameter in parameters.items():
        if state:
            optimizer.state[parameter] = {
                part: state[f"{name}/{part}"].clone() for part in ("step", "exp_avg", "exp_avg_sq")
            }
    return optimizer


def optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return AdamW's moments by ``parameter/part``, as plain tensors that safetensors can hold."""
    return {
        f"{name}/{part}": value.detach().cpu().contiguous()
        for name, parameter in policy.trainable().items()
        for part, value in optimizer.state.get(parameter, {}).items()
    }


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
    live = [i for rows in groups.values() if has_signal(np.array([rollouts.reward[r] for r in rows])) for i in rows]
    facts: dict[str, Any] = {"lr": optimization.lr_at(step), "signal": 0.0, "gradient_norm": 0.0, "clipped": False}
    if not live:
        return dict.fromkeys(groups, 1.0), facts
    gradients: dict[str, Tensor] = {}

    def keep(name: str, grads: Tensor) -> None:
        gradients[name] = gradients[name] + grads if name in gradients else grads

    uids = prompt_gradients(policy, rollouts.take(live), "grpo", keep, micro_tokens=optimization.micro_tokens)
    used, diagnostics = _weights(gradients, reference)
    for name, parameter in policy.trainable().items():
        mixed = torch.tensordot(torch.from_numpy(used).to(gradients[name]), gradients[name], dims=1)
        parameter.grad = (-mixed / size).to(parameter.dtype)
    norm = float(torch.nn.utils.clip_grad_norm_(list(policy.trainable().values()), optimization.clip_norm))
    if not np.isfinite(norm):
        raise FloatingPointError(f"step {step + 1}: the gradient norm is {norm}; prompts of the batch: {uids[:3]}...")
    for group in optimizer.param_groups:
        group["lr"] = facts["lr"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    facts |= {"signal": len(uids) / size, "gradient_norm": norm, "clipped": norm > optimization.clip_norm}
    facts |= {f"diem_{name}": value for name, value in asdict(diagnostics).items()} if diagnostics else {}
    return {uid: 1.0 for uid in groups} | dict(zip(uids, used.tolist(), strict=True)), facts


def _weights(
    gradients: dict[str, Tensor], reference: Reference | None
) -> tuple[Float[np.ndarray, " prompts"], Diagnostics | None]:
    """Return the weight of each prompt; Gram matrix and importance live in the reference's projected space."""
    count = len(next(iter(gradients.values())))
    if reference is None:
        return np.ones(count), None
    sketch = reference.projection.zeros(count, next(iter(gradients.values())).device)
    for name, grads in gradients.items():
        reference.projection.add(sketch, name, grads.flatten(1))
    rows = sketch.double().cpu().numpy()
    gram, importance = rows @ rows.T, rows @ reference.direction.astype(float)
    raw = diem_weights(gram, importance, ridge=reference.ridge)
    used = temper(raw, reference.strength)
    return used, diagnose(gram, raw, used, ridge=reference.ridge)
