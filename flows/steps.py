"""One thin step per arrow of the loop: compute the key, return it if it is there, else compute, write and return it.

Steps hand each other keys, never tensors. A key is a digest of all that the result depends on, so a step that was
finished by a run that was killed is found again, whoever asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flows import evidence, selections
from flows.desk import Desk
from pipeline.columns import spread


def select(desk: Desk, data: str, rollouts: Sequence[str], excluded: np.ndarray, scores: str, stage: int) -> str:
    """Fill a stage by fused influence and a random floor; every prompt of the pool gets a reason.

    ``excluded`` has the number of the reason of each prompt of the pool that has no gradient, as the cascade gives it.
    """
    from pipeline.curriculum import select_by_influence

    settings, seed = desk.config.select, desk.seed("select", stage)
    excluded = np.asarray(excluded, np.int8)  # JSON has lists
    key = desk.store.key(
        "selection",
        data=data,
        scores=scores,
        excluded=selections.spell_reasons(desk, data, excluded),
        stage=stage,
        seed=seed,
        **settings.model_dump(),
    )
    if not desk.store.done(key):
        pool, size = desk.pool(data), len(desk.pool(data)) + len(desk.excluded(data)[0])
        scored, names, aligned = selections.read_scores(desk, scores, pool)
        budget = max(1, int(settings.share * len(pool)))
        chosen = select_by_influence(pool, excluded, scored, aligned, budget=budget, floor=settings.floor, seed=seed)
        measured = {name: spread(size, scored, aligned[:, column]) for column, name in enumerate(names)}
        measured |= evidence.read_staleness(desk, desk.store.meta(scores).get("pool", []), size, pool)
        selections.write(desk, key, data, rollouts, chosen, stage, measured)
    return key


def shuffle(desk: Desk, data: str, rollouts: Sequence[str], stage: int, *, budget: int, seed: int) -> str:
    """Fill a stage at random, keyed by identity: the first stage without evidence, and every control."""
    from pipeline.curriculum import select_at_random

    key = desk.store.key("selection", data=data, rollouts=list(rollouts), budget=budget, stage=stage, seed=seed)
    if not desk.store.done(key):
        chosen = select_at_random(desk.pool(data), budget=budget, seed=seed)
        selections.write(desk, key, data, rollouts, chosen, stage, {})
    return key


def train(
    desk: Desk,
    policy: str,
    data: str,
    selection: str,
    rollouts: Sequence[str],
    *,
    targets: Mapping[str, tuple[Sequence[str], int]] | None,
    way: str,
    sampler: str,
    first: int,
    steps: int,
    stage_start: int,
    total: int,
) -> str:
    """Take ``steps`` optimizer steps on a stage and store checkpoint, optimizer state, rollouts and metrics.

    Steps are weighted by ``way``, plain where it is empty, against the mean gradient of ``targets`` if they are given.
    """
    from flows.learning import run_segment

    config = desk.config
    key = desk.store.key(
        "policy",
        start=policy,
        adapter=desk.adapter,
        selection=selection,
        rollouts=list(rollouts),
        sampler=sampler,
        first=first,
        steps=steps,
        stage_start=stage_start,
        total=total,
        seed=config.seed,
        train=config.train.model_dump(),
        sampling=config.sampling.model_dump(),
        beliefs=config.beliefs.model_dump(),
        insight=config.insight.model_dump(),
        diem=config.diem.model_dump() | {"way": way} if way else {},
        targets={name: [list(keys), size] for name, (keys, size) in targets.items()} if targets else {},
        **desk.engines.identity(desk.engines.trained),
    )
    if not desk.store.done(key):
        evidence.refuse_images(desk, data, selections.chosen(desk, selection))
        direction = (
            np.mean([evidence.mean_target(desk, *target) for target in targets.values()], axis=0) if targets else None
        )
        run_segment(
            desk,
            key,
            policy,
            data,
            selection,
            rollouts,
            direction,
            way=way,
            sampler=sampler,
            first=first,
            steps=steps,
            stage_start=stage_start,
            total=total,
        )
    else:
        desk.advance(steps)
    return key


def evaluate(desk: Desk, policy: str, data: str, splits: Sequence[str]) -> str:
    """Measure a checkpoint on held-out sets."""
    from flows.learning import measure

    settings, sampling = desk.config.evaluate, desk.config.sampling
    key = desk.store.key(
        "evaluation",
        policy=policy,
        data=data,
        splits=list(splits),
        exact=settings.exact,
        limit=settings.limit,
        max_new_tokens=settings.max_new_tokens or sampling.max_new_tokens,
        stop=list(sampling.stop),
        **desk.engines.identity(desk.engines.name(policy)),
    )
    if not desk.store.done(key):
        desk.store.record(
            key, "evaluation", {"sets": {split: measure(desk, policy, desk.prompts(data, split)) for split in splits}}
        )
    return key
