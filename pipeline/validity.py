r"""Which scores say what a prompt does: every scorer held against measured effects, by rank.

    rho = rank agreement of a score with an effect           ``pipeline.scorers``, ``pipeline.counterfactual``,
    R   = reliability of a score over a prompt's rollouts    ``pipeline.agreement``

The effects: ``unit`` and ``raw``, steps on the rollouts that were scored; ``other``, a unit step on another set of
rollouts of the same prompts, which may have no signal and then moves nothing; ``left_out``, the retraining of a small
pool without the prompt. Prompts whose scored rollouts agree have neither gradient nor effect: they are counted, and
left out of rho, which they could only flatter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.advantages import has_signal
from pipeline.agreement import rank_agreement, reliability
from pipeline.counterfactual import (
    Gradient,
    alignments,
    inner,
    leave_one_out,
    policy_gradient,
    step_effects,
)
from pipeline.directional import in_float32, target_direction
from pipeline.evaluation import expected_reward_gradient
from pipeline.policy import Policy
from pipeline.records import Prompts, Rollouts
from pipeline.scorers import SCORERS, Settings, know

REVISION = 1
EFFECTS = ("unit", "raw", "other", "left_out")
POOL = 24  # prompts of the pool that is retrained without each of its own
DTYPE_PROMPTS = 8  # prompts whose gradient is compared with that in float32


def compare(
    policy: Policy,
    own: Rollouts,
    other: Rollouts,
    validation_rollouts: Rollouts,
    held_out: Mapping[str, Prompts],
    settings: Settings,
    *,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Score the prompts of ``own``, measure what each does, and say how far the scores predict it.

    Args:
        policy: scored in its own dtype; steps are taken on a float32 copy of it where it has another.
        own: rollouts of some prompts: scored, stepped on, and (the first ``POOL`` with signal) retrained on.
        other: rollouts of the same prompts, of another draw.
        validation_rollouts: rollouts of the prompts of ``held_out["validation"]``.
        held_out: prompts with unique answers: ``validation``, and any others that J is to be measured on.
        settings: of the run.
        advance: called with 1 after each prompt that a step was taken on, and each retraining; ``work`` of them.

    Returns:
        Columns, one row a prompt with signal (an effect that was not measured is None), and the result.

    Raises:
        ValueError: fewer than two prompts have signal, or a held-out prompt is not verified by exact match.
    """
    options: dict[str, Any] = {"objective": settings.objective, "micro_tokens": settings.micro_tokens}
    steps: dict[str, Any] = {**options, "chat": settings.chat, "advance": advance}
    asked = len(own.groups())
    own, precise = with_signal(own), in_float32(policy)
    uids = tuple(own.groups())
    if len(uids) < 2:
        raise ValueError(f"{len(uids)} of {asked} prompts have rewards that differ; ask for more prompts (--prompts)")
    goals, size = with_signal(validation_rollouts), len(held_out["validation"])
    if not len(goals):
        raise ValueError("validation_rollouts: the rewards of every prompt agree; there is no gradient to align with")
    target = target_direction(policy, goals, size=size, **options)
    truth = expected_reward_gradient(precise, held_out["validation"], chat=settings.chat)
    known = know(policy, own, goals, size, target, truth, settings)
    scores = {name: score(known) for name, score in SCORERS.items()}

    effects = step_effects(precise, own, held_out, **steps)
    again = of_prompts(other, uids)
    effects["other"] = step_effects(precise, again, held_out, kinds=("unit",), **steps)["unit"]
    pool = uids[:POOL]
    effects["left_out"], whole = leave_one_out(precise, of_prompts(own, pool), held_out, **steps)

    agreement = {
        effect: {
            split: {name: rank_agreement(column[: len(values)], values) for name, column in scores.items()}
            for split, values in sets.items()
        }
        for effect, sets in effects.items()
    }
    columns: dict[str, list[Any]] = {"prompt_uid": list(uids)}
    columns |= {f"score_{name}": column.tolist() for name, column in scores.items()}
    for effect, sets in effects.items():
        for split, values in sets.items():
            columns[f"effect_{effect}_{split}"] = values.tolist() + [None] * (len(uids) - len(values))
    result = {
        "agreement": agreement,
        "effects": {
            effect: {s: {"mean": float(v.mean()), "sd": float(v.std())} for s, v in sets.items()}
            for effect, sets in effects.items()
        },
        "reliability": split_half(policy, own, target, **options),
        "target_cosine": inner(target, truth) / (inner(target, target) * inner(truth, truth)) ** 0.5,
        "dtype": dtype_noise(policy, precise, own, **options),
        "prompts": {
            "asked": asked,
            "signal": len(uids),
            "signal_other": len(with_signal(again).groups()),
            "pool": len(pool),
        },
        "pool_change": whole,
    }
    return columns, result


def work(prompts: int) -> int:
    """Return how often ``compare`` calls ``advance`` for that many prompts with signal."""
    return 2 * prompts + min(prompts, POOL) + 1


def split_half(
    policy: Policy, rollouts: Rollouts, target: Gradient, *, objective: str, micro_tokens: int
) -> dict[str, Any]:
    """Return the reliability of ``cropi`` and ``dot`` over the rollouts of a prompt, from even and odd ones.

    A half whose rewards agree has no gradient: it scores zero, as the prompt would with those rollouts alone.
    """
    halves: list[dict[str, np.ndarray]] = []
    for parity in (0, 1):
        rows = [i for group in rollouts.groups().values() for i in group[parity::2]]
        found = alignments(policy, rollouts.take(rows), {"dot": target}, objective=objective, micro_tokens=micro_tokens)
        norm = found["norm"]
        halves.append(
            {"dot": found["dot"], "cropi": np.divide(found["dot"], norm, out=np.zeros_like(norm), where=norm > 0)}
        )
    first, second = halves
    return {name: reliability(first[name], second[name]) for name in ("cropi", "dot")}


def dtype_noise(
    policy: Policy, precise: Policy, rollouts: Rollouts, *, objective: str, micro_tokens: int
) -> dict[str, Any] | None:
    """Return the cosine of some prompts' gradients in the policy's dtype and in float32; None where it is float32."""
    if precise is policy:
        return None
    cosines = []
    for rows in list(rollouts.groups().values())[:DTYPE_PROMPTS]:
        part = rollouts.take(rows)
        a, b = (policy_gradient(p, part, objective, micro_tokens=micro_tokens) for p in (policy, precise))
        scale = (inner(a, a) * inner(b, b)) ** 0.5
        cosines.append(inner(a, b) / scale if scale > 0 else 0.0)
    dtype = str(policy.model.dtype).removeprefix("torch.")
    return {"dtype": dtype, "prompts": len(cosines), "mean": float(np.mean(cosines)), "least": min(cosines)}


def with_signal(rollouts: Rollouts) -> Rollouts:
    """Return the rollouts of the prompts whose rewards differ."""
    groups = rollouts.groups().values()
    return rollouts.take(
        [i for rows in groups if has_signal(np.array([rollouts.reward[r] for r in rows])) for i in rows]
    )


def of_prompts(rollouts: Rollouts, uids: Sequence[str]) -> Rollouts:
    """Return the rollouts of some prompts, in the order of ``uids``.

    Raises:
        ValueError: a prompt has none; the message names it.
    """
    groups = rollouts.groups()
    missing = [uid for uid in uids if uid not in groups]
    if missing:
        raise ValueError(f"{len(missing)} prompt(s) have no rollouts here, first {missing[0]}; collect them too")
    return rollouts.take([i for uid in uids for i in groups[uid]])
