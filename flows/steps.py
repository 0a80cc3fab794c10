"""One thin step per arrow of the loop: compute the key, return it if it is there, else compute, write and return it.

Steps hand each other keys, never tensors. A key is a digest of all that the result depends on, so a step that was
finished by a run that was killed is found again, whoever asks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flows import evidence
from flows.desk import Desk


def select(desk: Desk, data: str, rollouts: Sequence[str], excluded: Mapping[str, str], scores: str, stage: int) -> str:
    """Fill a stage by fused influence and a random floor; every prompt of the pool gets a reason."""
    from pipeline.curriculum import select_by_influence

    settings, seed = desk.config.select, desk.seed("select", stage)
    key = desk.store.key(
        "selection",
        data=data,
        scores=scores,
        excluded=sorted(excluded.items()),
        stage=stage,
        seed=seed,
        **settings.model_dump(),
    )
    if not desk.store.done(key):
        table, pool = desk.store.tables.read(scores), desk.prompts(data, "pool").prompt_uid
        names = evidence.targets_of(table)
        cosines = np.array([table[name] for name in names], float).reshape(len(names), len(table["prompt_uid"])).T
        budget = max(1, int(settings.share * len(pool)))
        chosen = select_by_influence(
            pool, excluded, table["prompt_uid"], cosines, budget=budget, floor=settings.floor, seed=seed
        )
        evidence.write_selection(
            desk,
            key,
            data,
            rollouts,
            chosen,
            stage,
            {name: dict(zip(table["prompt_uid"], table[name], strict=True)) for name in names}
            | evidence.read_staleness(desk, desk.store.meta(scores).get("pool", [])),
        )
    return key


def shuffle(desk: Desk, data: str, rollouts: Sequence[str], stage: int, *, budget: int, seed: int) -> str:
    """Fill a stage at random, keyed by identity: the first stage without evidence, and every control."""
    from pipeline.curriculum import select_at_random

    key = desk.store.key("selection", data=data, rollouts=list(rollouts), budget=budget, stage=stage, seed=seed)
    if not desk.store.done(key):
        chosen = select_at_random(desk.prompts(data, "pool").prompt_uid, budget=budget, seed=seed)
        evidence.write_selection(desk, key, data, rollouts, chosen, stage, {})
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
        evidence.refuse_images(desk, data, evidence.chosen(desk, selection))
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
