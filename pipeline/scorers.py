r"""The table of scorers that are held against measured effects, and what they may know of a prompt.

    v      = mean over all validation prompts of their policy gradients           g_i  gradient of prompt i
    cropi  = <g_i, v> / |g_i|                  dot = <g_i, v>            full gradients; |v| is common to all prompts
    exact  = <g_i, grad J> / |g_i|             J = expected validation reward, from the answers
    insight = w(m) I,  variance = p (1 - p),  norm = |g_i|,  uniform = a hash of (seed, prompt_uid)

``cropi_sketch`` is ``cropi`` as a run computes it, through its projection; ``directional`` is ``dot`` from forward
passes alone. ``exact`` knows the answers: it is no method, but the limit that a v without error would reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from pipeline.counterfactual import Gradient, alignments
from pipeline.directional import dot_scores
from pipeline.influence import cosine, mean_gradient
from pipeline.policy import Policy
from pipeline.records import Rollouts
from pipeline.selectors import insight, uniform


@dataclass(frozen=True)
class Settings:
    """What the comparison takes from the run.

    Attributes:
        objective: name in ``pipeline.objective.OBJECTIVES``.
        sketch: returns the prompts of some rollouts and their features, as the run projects them.
        prior: of the beliefs.
        mu: of the weight of difficulty, as is eta.
        eta: see mu.
        seed: of the random score.
        chat: render messages with the chat template.
        micro_tokens: most tokens in one backward pass.
    """

    objective: str
    sketch: Callable[[Policy, Rollouts], tuple[list[str], Float[np.ndarray, "prompts dim"]]]
    prior: tuple[float, float]
    mu: float
    eta: float
    seed: int
    chat: bool
    micro_tokens: int


@dataclass(frozen=True)
class Known:
    """What scorers may know of each prompt: nothing here was measured by taking a step.

    Attributes:
        prompt_uid: the prompts.
        dot: <g_i, v>.
        norm: |g_i|.
        sketched: cosine of g_i and v through the run's projection.
        directional: <g_i, v> from forward passes (``pipeline.directional``).
        exact: <g_i, grad J> with J the mean expected reward of the validation sets.
        successes: rollouts that were right.
        rollouts: rollouts a prompt.
        settings: of the run.
    """

    prompt_uid: tuple[str, ...]
    dot: Float[np.ndarray, " prompts"]
    norm: Float[np.ndarray, " prompts"]
    sketched: Float[np.ndarray, " prompts"]
    directional: Float[np.ndarray, " prompts"]
    exact: Float[np.ndarray, " prompts"]
    successes: Float[np.ndarray, " prompts"]
    rollouts: Float[np.ndarray, " prompts"]
    settings: Settings


def _insight(known: Known) -> Float[np.ndarray, " prompts"]:
    settings, (a, b) = known.settings, known.settings.prior
    alpha, beta = a + known.successes, b + known.rollouts - known.successes
    return insight.score(alpha, beta, rollouts=int(known.rollouts.max()), mu=settings.mu, eta=settings.eta)


def _variance(known: Known) -> Float[np.ndarray, " prompts"]:
    p = known.successes / known.rollouts
    return p * (1 - p)


SCORERS: dict[str, Callable[[Known], Float[np.ndarray, " prompts"]]] = {
    "cropi": lambda known: known.dot / known.norm,  # |v| is common to all
    "cropi_sketch": lambda known: known.sketched,
    "dot": lambda known: known.dot,
    "directional": lambda known: known.directional,
    "insight": _insight,
    "variance": _variance,
    "norm": lambda known: known.norm,
    "uniform": lambda known: uniform.score(known.prompt_uid, seed=known.settings.seed),
    "exact": lambda known: known.exact / known.norm,
}
"""Scores by name; higher should mean a larger effect."""


def know(
    policy: Policy,
    own: Rollouts,
    goals: Rollouts,
    size: int,
    target: Gradient,
    truth: Gradient,
    settings: Settings,
) -> Known:
    """Gather what the scorers need of each prompt of ``own``, all of which have signal.

    Args:
        policy: at which gradients are taken.
        own: rollouts of the prompts.
        goals: rollouts of the validation prompts that have signal.
        size: validation prompts, those without signal included.
        target: v.
        truth: grad J.
        settings: of the run.
    """
    options: dict[str, Any] = {"objective": settings.objective, "micro_tokens": settings.micro_tokens}
    aligned = alignments(policy, own, {"dot": target, "exact": truth}, **options)
    (_, rows), (_, aims) = settings.sketch(policy, own), settings.sketch(policy, goals)
    v = mean_gradient(aims, np.ones(len(aims), np.float32), size=size)
    groups = own.groups()
    return Known(
        prompt_uid=tuple(groups),
        dot=aligned["dot"],
        norm=aligned["norm"],
        sketched=cosine(rows, v[None])[:, 0].astype(float),
        directional=dot_scores(policy, own, settings.objective, target)[1],
        exact=aligned["exact"],
        successes=np.array([sum(own.verdict[i] == "correct" for i in rows) for rows in groups.values()], float),
        rollouts=np.array([len(rows) for rows in groups.values()], float),
        settings=settings,
    )
