"""From scores to a stage: every prompt of the pool ends with one reason code, and a stage with a random twin.

The cascade, cheapest first: prompts that were left out when the pool was read (``duplicate``, ``contaminated``,
``error``); prompts without stored rollouts (``unseen``) or whose rollouts agree (``no_signal``): they have no gradient;
prompts that the difficulty weight w(p) ranks lowest (``prior``); then the fused influence up to the budget.
Information gain is not used as a filter: it is smallest for the prompts that were just trained on, the only ones with
fresh evidence. A share of each stage, the floor, is drawn at random from the whole pool, so that unseen prompts come to
be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, Int8

from pipeline.influence import fuse_ranks
from pipeline.records import REASONS, keyed_seed
from pipeline.selectors import insight, uniform

CODE = {name: code for code, name in enumerate(REASONS)}
"""Reasons by number: their place in ``pipeline.records.REASONS``."""
NONE = -1
"""No reason: this prompt gets a gradient."""
DRAWN = ("influence", "floor", "shuffle")
"""What chose a prompt."""
Uids: TypeAlias = Sequence[str] | pa.Array
"""prompt_uids: a list, or an Arrow column of strings, which takes a third of the memory."""


@dataclass(frozen=True, eq=False)
class Selection:
    """A stage: who is in it and why. Prompts are named by their place in the pool.

    Attributes:
        reason: of each prompt of the pool, by its number in ``CODE``.
        chosen: the prompts of the stage, best first.
        drawn: for each chosen prompt what chose it, by its place in ``DRAWN``.
        fused: fused influence of each prompt of the pool; NaN where it was not scored.
    """

    reason: Int8[np.ndarray, " prompts"]
    chosen: Int[np.ndarray, " chosen"]
    drawn: Int8[np.ndarray, " chosen"]
    fused: Float[np.ndarray, " prompts"]


def candidates(
    uids: Uids,
    alpha: Float[np.ndarray, " prompts"],
    beta: Float[np.ndarray, " prompts"],
    seen: Bool[np.ndarray, " prompts"],
    signal: Bool[np.ndarray, " prompts"],
    *,
    share: float,
    mu: float,
    eta: float,
) -> Int8[np.ndarray, " prompts"]:
    """Return the number of a reason for each prompt that is not worth a gradient, and ``NONE`` for those that are.

    Args:
        uids: the eligible pool.
        alpha: beliefs, one value a prompt.
        beta: the same.
        seen: whether a prompt has stored rollouts.
        signal: whether their rewards differ.
        share: most prompts that get a gradient, as a share of the pool; ranked by w(p).
        mu: of the difficulty weight, see ``pipeline.selectors.insight``.
        eta: the same.
    """
    reason = np.full(len(uids), NONE, np.int8)
    reason[~signal], reason[~seen] = CODE["no_signal"], CODE["unseen"]
    weight = insight.difficulty_weight(alpha / (alpha + beta), mu=mu, eta=eta)
    left = np.flatnonzero(reason == NONE)
    left = left[pc.array_sort_indices(_taken(uids, left)).to_numpy()]  # equal weights rank by uid
    order = left[np.argsort(-weight[left], kind="stable")]
    reason[order[max(1, int(share * len(uids))) :]] = CODE["prior"]
    return reason


def select_by_influence(
    uids: Uids,
    excluded: Int8[np.ndarray, " prompts"],
    scored: Int[np.ndarray, " scored"],
    cosines: Float[np.ndarray, "scored targets"],
    *,
    budget: int,
    floor: float,
    seed: int,
) -> Selection:
    """Fill a stage with the best fused influence, and its floor from a shuffle of the whole pool.

    Args:
        uids: the eligible pool.
        excluded: reason of each prompt that has no score, as ``candidates`` gives it.
        scored: the prompts with a score, by their place in the pool; one row of ``cosines`` each.
        cosines: alignment with each target.
        budget: size of the stage.
        floor: share of the budget that is drawn at random.
        seed: keys the floor, and breaks ties.
    """
    draw = uniform.score(_taken(uids, scored), seed=keyed_seed("ties", seed))
    order = np.argsort(draw, kind="stable")  # equal cosines rank by row
    value, scored = fuse_ranks(cosines[order], budget), scored[order]
    fused = np.full(len(uids), np.nan)
    fused[scored] = value
    size, inside = min(budget, len(uids)), np.flatnonzero(value > 0)
    best = scored[inside[np.argsort(-value[inside], kind="stable")]][: size - int(floor * size)]
    rest = np.ones(len(uids), bool)
    rest[best] = False
    drawn = _shuffled(uids, np.flatnonzero(rest), keyed_seed("floor", seed))[: size - len(best)]
    how = np.repeat(np.array([0, 1], np.int8), [len(best), len(drawn)])
    return _selection(excluded, np.concatenate([best, drawn]), how, fused)


def select_at_random(uids: Uids, *, budget: int, seed: int) -> Selection:
    """Fill a stage from a shuffle that is keyed by identity: the first stage without evidence, and every control."""
    chosen = _shuffled(uids, np.arange(len(uids)), seed)[:budget]
    nobody, shuffle = np.full(len(uids), NONE, np.int8), np.full(len(chosen), DRAWN.index("shuffle"), np.int8)
    return _selection(nobody, chosen, shuffle, np.full(len(uids), np.nan))


def overlap(stages: Sequence[Sequence[str]]) -> Float[np.ndarray, "stages stages"]:
    """Return the share of each stage's prompts that are also in each other stage."""
    sets = [set(stage) for stage in stages]
    return np.array([[len(a & b) / max(1, len(a)) for b in sets] for a in sets])


def _taken(uids: Uids, rows: Int[np.ndarray, " rows"]) -> pa.Array:
    return (uids if isinstance(uids, pa.Array) else pa.array(uids, pa.string())).take(pa.array(rows))


def _shuffled(uids: Uids, rows: Int[np.ndarray, " rows"], seed: int) -> Int[np.ndarray, " rows"]:
    return rows[np.argsort(uniform.score(_taken(uids, rows), seed=seed), kind="stable")]


def _selection(excluded: np.ndarray, chosen: np.ndarray, drawn: np.ndarray, fused: np.ndarray) -> Selection:
    reason = np.where(excluded == NONE, np.int8(CODE["budget"]), excluded)
    reason[chosen] = CODE["selected"]
    return Selection(reason, chosen, drawn, fused)
