"""Generations of gradients: which shards of prompts make one each, under which key, and how one is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flows import evidence
from flows.desk import Desk

if TYPE_CHECKING:
    from flows.gradients import Space
    from pipeline.records import Rollouts
    from pipeline.staleness import Staleness


class Watched:
    """Describes the evidence of each prompt by the log-probabilities that a gradient pass makes anyway."""

    def __init__(self) -> None:
        self.found: list[tuple[list[str], Staleness]] = []

    def __call__(self, rollouts: Rollouts, logp_new: np.ndarray) -> None:
        """See the whole groups of some passes."""
        from pipeline.staleness import of_rollouts

        self.found.append(of_rollouts(rollouts, logp_new))


def shards_of(
    desk: Desk, policy: str, uids: Sequence[str], rollouts: Sequence[str], where: Space
) -> dict[str, list[str]]:
    """Return the generations that prompts with stored rollouts make, and the prompts of each, in their order."""
    size, shards = desk.config.evidence.shard, {}
    for start in range(0, len(uids), size):
        shard = list(uids[start : start + size])
        shards[generation_key(desk, policy, where, shard, rollouts)] = shard
    return shards


def generation_key(desk: Desk, policy: str, where: Space, shard: Sequence[str], rollouts: Sequence[str]) -> str:
    """Return the key of the features of one shard of prompts; how many processes make them is no part of it."""
    return desk.store.key(
        "gradients",
        policy=policy,
        adapter=desk.adapter,
        projection=where.projection.identity,
        metric=where.metric,
        objective=desk.config.features.objective,
        prompts=list(shard),
        rollouts=list(rollouts),
        recent=desk.config.evidence.recent,
    )


def write_generation(
    desk: Desk, key: str, policy: str, where: Space, uids: Sequence[str], rows: np.ndarray, watched: Watched | None
) -> None:
    """Commit the features of one shard, those without gradient left out, and what was ``watched`` on the way."""
    meta = {
        "policy": policy,
        "projection": desk.store.key("projection", **where.projection.identity),
        "objective": desk.config.features.objective,
    }
    stale = evidence.staleness_key(desk, key)
    if watched is not None and not desk.store.done(stale):  # before the gradients, so that these are never without it
        evidence.write_staleness(desk, stale, watched.found)
    alive = np.flatnonzero(np.abs(rows).sum(axis=1) > 0)
    desk.store.gradients.write(key, [uids[i] for i in alive], rows[alive], meta)
