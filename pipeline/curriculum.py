"""From scores to a stage: every prompt of the pool ends with one reason code, and a stage with a random twin.

The cascade, cheapest first: prompts that were left out when the pool was read (``duplicate``, ``contaminated``,
``error``); prompts without stored rollouts (``unseen``) or whose rollouts agree (``no_signal``): they have no gradient;
prompts that the difficulty weight w(p) ranks lowest (``prior``); then the fused influence up to the budget.
Information gain is not used as a filter: it is smallest for the prompts that were just trained on, the only ones with
fresh evidence. A share of each stage, the floor, is drawn at random from the whole pool, so that unseen prompts come to
be seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pipeline.influence import fuse_ranks
from pipeline.records import keyed_seed
from pipeline.selectors import insight, uniform


@dataclass(frozen=True)
class Selection:
    """A stage: who is in it and why, one entry a prompt of the pool.

    Attributes:
        reason: code of ``pipeline.records.REASONS`` for each prompt_uid.
        chosen: the prompt_uids of the stage, best first.
        drawn: for each chosen prompt, ``influence``, ``floor`` or ``shuffle``: what chose it.
        fused: fused influence of the prompts that were scored.
    """

    reason: dict[str, str]
    chosen: list[str]
    drawn: list[str]
    fused: dict[str, float]


def candidates(
    uids: Sequence[str],
    alpha: Float[np.ndarray, " prompts"],
    beta: Float[np.ndarray, " prompts"],
    signal: Mapping[str, bool],
    *,
    share: float,
    mu: float,
    eta: float,
) -> dict[str, str]:
    """Return a reason for each prompt that is not worth a gradient; those without an entry are.

    Args:
        uids: the eligible pool.
        alpha: beliefs, one value a prompt.
        beta: the same.
        signal: for each prompt with stored rollouts, whether their rewards differ.
        share: most prompts that get a gradient, as a share of the pool; ranked by w(p).
        mu: of the difficulty weight, see ``pipeline.selectors.insight``.
        eta: the same.
    """
    reason = {uid: "unseen" if uid not in signal else "no_signal" for uid in uids if not signal.get(uid, False)}
    weight = insight.difficulty_weight(alpha / (alpha + beta), mu=mu, eta=eta)
    order = [uids[i] for i in np.lexsort((np.array(uids), -weight)) if uids[i] not in reason]
    return reason | dict.fromkeys(order[max(1, int(share * len(uids))) :], "prior")


def select_by_influence(
    uids: Sequence[str],
    excluded: Mapping[str, str],
    scored: Sequence[str],
    cosines: Float[np.ndarray, "prompts targets"],
    *,
    budget: int,
    floor: float,
    seed: int,
) -> Selection:
    """Fill a stage with the best fused influence, and its floor from a shuffle of the whole pool.

    Args:
        uids: the eligible pool.
        excluded: reason of each prompt that has no score.
        scored: the prompts with a score; one row of ``cosines`` each.
        cosines: alignment with each target.
        budget: size of the stage.
        floor: share of the budget that is drawn at random.
        seed: keys the floor, and breaks ties.
    """
    order = np.argsort(uniform.score(scored, seed=keyed_seed("ties", seed)), kind="stable")  # equal cosines rank by row
    fused = dict(zip([scored[i] for i in order], fuse_ranks(cosines[order], budget).tolist(), strict=True))
    size = min(budget, len(uids))
    best = sorted((uid for uid, value in fused.items() if value > 0), key=lambda uid: -fused[uid])
    best = best[: size - int(floor * size)]
    taken = set(best)
    rest = _shuffled([uid for uid in uids if uid not in taken], keyed_seed("floor", seed))
    drawn = rest[: size - len(best)]
    return _selection(uids, excluded, best + drawn, ["influence"] * len(best) + ["floor"] * len(drawn), fused)


def select_at_random(uids: Sequence[str], *, budget: int, seed: int) -> Selection:
    """Fill a stage from a shuffle that is keyed by identity: the first stage without evidence, and every control."""
    chosen = _shuffled(uids, seed)[:budget]
    return _selection(uids, {}, chosen, ["shuffle"] * len(chosen), {})


def overlap(stages: Sequence[Sequence[str]]) -> Float[np.ndarray, "stages stages"]:
    """Return the share of each stage's prompts that are also in each other stage."""
    sets = [set(stage) for stage in stages]
    return np.array([[len(a & b) / max(1, len(a)) for b in sets] for a in sets])


def _shuffled(uids: Sequence[str], seed: int) -> list[str]:
    order = np.argsort(uniform.score(uids, seed=seed), kind="stable")
    return [uids[i] for i in order]


def _selection(
    uids: Sequence[str], excluded: Mapping[str, str], chosen: list[str], drawn: list[str], fused: dict[str, float]
) -> Selection:
    inside = set(chosen)
    reason = {uid: "selected" if uid in inside else excluded.get(uid, "budget") for uid in uids}
    return Selection(reason, chosen, drawn, fused)
