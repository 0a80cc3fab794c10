r"""Counterfactual effects: what a prompt really does to the expected reward, to compare its score with.

    J(theta) = mean over held-out x of P(correct | x; theta)                     exact, ``pipeline.evaluation``
    unit       e_i = J(theta + h |theta| g_i / |g_i|) - J(theta)                 a step of fixed length on i alone
    raw        e_i = J(theta + h g_i) - J(theta)                                 a step as long as the gradient is
    left out   e_i = J(theta_m) - J(theta_m without i)                           m steps on a pool, with and without i
               theta' = theta + (r / n) sum over p in the pool, p != i, of g_p(theta)

g_i   policy gradient of prompt i from stored rollouts (``pipeline.gradients``), zero where its rewards agree
h     step length, small enough for the first order to hold on the embedded policy (LOG.md)
r     such that the first step on the whole pool has length h |theta|;  n = prompts of the whole pool

To first order the effects are h |theta| <g_i, grad J> / |g_i|, h <g_i, grad J> and (m r / n) <g_i, grad J>. Every
retraining rests on the same rollouts, reweighted to the policy of the moment: nothing is sampled, so a difference is
due to the prompt alone. The weights are given back bit for bit.
Departure from retraining in earnest: plain ascent, not Adam, so that no moments carry one prompt into another's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.evaluation import answer_batches, chances
from pipeline.gradients import prompt_gradients
from pipeline.policy import Policy
from pipeline.records import Prompts, Rollouts

Gradient = dict[str, Tensor]
"""One gradient, float32, by parameter."""

STEP = {"unit": 5e-5, "raw": 2e-4}  # h: the first order orders the effects at .97 and more; at 4 times that, at .74
RETRAIN_STEP, RETRAIN_STEPS = 1e-4, 8  # h and m of a retraining


def policy_gradient(policy: Policy, rollouts: Rollouts, objective: str, *, micro_tokens: int = 65_536) -> Gradient:
    """Return the sum of the policy gradients of the prompts of ``rollouts``; the one place that knows the sink."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in policy.trainable().items()}

    def sink(name: str, prompts: slice, grads: Tensor, rows: Tensor | None = None) -> None:
        part = grads.sum(dim=0)
        if rows is None:
            total[name] += part
        else:
            total[name].index_add_(0, rows, part)

    prompt_gradients(policy, rollouts, objective, sink, micro_tokens=micro_tokens)
    return total


def inner(a: Gradient, b: Gradient) -> float:
    """Return <a, b>, summed in float64."""
    return sum(float(a[name].double().flatten() @ b[name].double().flatten()) for name in a)


def alignments(
    policy: Policy,
    rollouts: Rollouts,
    targets: Mapping[str, Gradient],
    *,
    objective: str,
    micro_tokens: int = 65_536,
) -> dict[str, Float[np.ndarray, " prompts"]]:
    """Return each prompt's gradient norm and its inner product with each target, from full gradients, one at a time.

    Args:
        policy: the policy at which gradients are taken.
        rollouts: stored rollouts; the rows of the result are their prompts, in order of first appearance.
        targets: gradients by name; ``norm`` is taken.
        objective: name in ``pipeline.objective.OBJECTIVES``.
        micro_tokens: most tokens in one backward pass.
    """
    found: dict[str, list[float]] = {name: [] for name in (*targets, "norm")}
    for rows in rollouts.groups().values():
        gradient = policy_gradient(policy, rollouts.take(rows), objective, micro_tokens=micro_tokens)
        found["norm"].append(inner(gradient, gradient) ** 0.5)
        for name, target in targets.items():
            found[name].append(inner(gradient, target))
    return {name: np.array(column) for name, column in found.items()}


def step_effects(
    policy: Policy,
    rollouts: Rollouts,
    held_out: Mapping[str, Prompts],
    *,
    objective: str,
    kinds: Sequence[str] = tuple(STEP),
    size: Mapping[str, float] = STEP,
    chat: bool = False,
    micro_tokens: int = 65_536,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, dict[str, Float[np.ndarray, " prompts"]]]:
    """Return the change of J on each held-out set after a small step on each prompt alone, by kind of step and by set.

    Args:
        policy: float32; as it was again when this returns.
        rollouts: stored rollouts; the rows of the result are their prompts, in order of first appearance.
        held_out: prompts with unique answers, by name of the set.
        objective: name in ``pipeline.objective.OBJECTIVES``.
        kinds: ``unit``, ``raw`` or both. A prompt without gradient takes no step, and its change is zero.
        size: h of each kind.
        chat: render messages with the chat template.
        micro_tokens: most tokens in one backward pass.
        advance: called with 1 after each prompt.

    Raises:
        ValueError: a held-out prompt is not verified by exact match, or the policy's dtype would round the step away.
    """
    _refuse_coarse(policy)
    level = _Level(policy, held_out, chat)
    before, length = level(), _norm(policy.trainable())
    out = {kind: {name: np.zeros(len(rollouts.groups())) for name in held_out} for kind in kinds}
    with restored(policy) as restore:
        for i, rows in enumerate(rollouts.groups().values()):
            gradient = policy_gradient(policy, rollouts.take(rows), objective, micro_tokens=micro_tokens)
            norm = _norm(gradient)
            for kind in kinds if norm > 0 else ():
                _move(policy, gradient, size[kind] * (length / norm if kind == "unit" else 1))
                for name, value in level().items():
                    out[kind][name][i] = value - before[name]
                restore()
            advance(1)
    return out


def leave_one_out(
    policy: Policy,
    rollouts: Rollouts,
    held_out: Mapping[str, Prompts],
    *,
    objective: str,
    steps: int = RETRAIN_STEPS,
    size: float = RETRAIN_STEP,
    chat: bool = False,
    micro_tokens: int = 65_536,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[dict[str, Float[np.ndarray, " prompts"]], dict[str, float]]:
    """Return what each prompt of a pool contributed to training on it, by set, and the change of J by the whole pool.

    Args:
        policy: float32; as it was again when this returns.
        rollouts: stored rollouts of the pool; the rows of the result are its prompts, in order of first appearance.
        held_out: prompts with unique answers, by name of the set.
        objective: name in ``pipeline.objective.OBJECTIVES``.
        steps: m.
        size: h, the length of the first step on the whole pool.
        chat: render messages with the chat template.
        micro_tokens: most tokens in one backward pass.
        advance: called with 1 after each retraining, of which there are as many as prompts, and one.

    Raises:
        ValueError: as for ``step_effects``; the pool has fewer than two prompts, or its gradients add up to zero.
    """
    _refuse_coarse(policy)
    groups = rollouts.groups()
    if len(groups) < 2:
        raise ValueError(f"rollouts hold {len(groups)} prompt(s): leaving one out needs a pool of two or more")
    norm = _norm(policy_gradient(policy, rollouts, objective, micro_tokens=micro_tokens))
    if norm == 0:
        raise ValueError("rollouts: the gradients of the pool add up to zero; take prompts whose rewards differ")
    level, rate = _Level(policy, held_out, chat), size * _norm(policy.trainable()) / norm
    before = level()
    with restored(policy) as restore:

        def train(rows: Sequence[int]) -> dict[str, float]:
            for _ in range(steps):
                part = rollouts.take(rows)
                _move(policy, policy_gradient(policy, part, objective, micro_tokens=micro_tokens), rate)
            after = level()
            restore()
            advance(1)
            return after

        whole = train(range(len(rollouts)))
        without = [train([r for r in range(len(rollouts)) if rollouts.prompt_uid[r] != uid]) for uid in groups]
    effects = {name: np.array([whole[name] - other[name] for other in without]) for name in held_out}
    return effects, {name: whole[name] - before[name] for name in held_out}


@contextmanager
def restored(policy: Policy) -> Iterator[Callable[[], None]]:
    """Yield a callable that gives the trainable weights back, bit for bit; they are given back at the end too."""
    kept = {name: p.detach().clone() for name, p in policy.trainable().items()}

    @torch.no_grad()
    def restore() -> None:
        for name, p in policy.trainable().items():
            p.copy_(kept[name])

    try:
        yield restore
    finally:
        restore()


class _Level:
    """J of each held-out set, its answers made ready once."""

    def __init__(self, policy: Policy, held_out: Mapping[str, Prompts], chat: bool) -> None:
        self.policy, self.sizes = policy, {name: len(prompts) for name, prompts in held_out.items()}
        self.batches = answer_batches(policy, Prompts.concat(held_out.values()), chat=chat)

    @torch.inference_mode()
    def __call__(self) -> dict[str, float]:
        parts = chances(self.policy, self.batches).double().split(list(self.sizes.values()))
        return {name: float(part.mean()) for name, part in zip(self.sizes, parts, strict=True)}


@torch.no_grad()
def _move(policy: Policy, direction: Gradient, length: float) -> None:
    for name, p in policy.trainable().items():
        p.add_(direction[name].to(p), alpha=length)


def _norm(gradient: Mapping[str, Tensor]) -> float:
    return sum(float(g.detach().double().square().sum()) for g in gradient.values()) ** 0.5


def _refuse_coarse(policy: Policy) -> None:
    coarse = {str(p.dtype) for p in policy.trainable().values() if p.dtype != torch.float32}
    if coarse:
        raise ValueError(f"policy holds {sorted(coarse)}: a small step would be rounded away; load it in float32")
