"""The steps that bring rollouts into the store: collected, imported, and collected anew where they have gone stale."""

from __future__ import annotations

from collections.abc import Sequence

from flows import evidence
from flows.desk import Desk
from flows.progress import Rate
from flows.spool import Spool
from pipeline.records import Prompts, Rollouts


def collect(
    desk: Desk, policy: str, data: str, split: str, *, rollouts: int, seed: int, uids: Sequence[str] | None = None
) -> list[str]:
    """Sample and score ``rollouts`` completions of each prompt of a split, or of its ``uids``; one key a shard."""
    prompts = desk.prompts(data, split)
    if uids is not None:
        prompts = prompts.take(prompts.rows_of(uids))
    return _collect(desk, policy, prompts, split, rollouts=rollouts, seed=seed)


def import_rollouts(desk: Desk, data: str) -> list[str]:
    """Bring in rollouts made elsewhere, joined to the pool by prompt_uid; what does not match is counted."""
    from pathlib import Path

    from pipeline.rollouts import match
    from stores.bundles import read_rollouts

    rollouts = Rollouts.of(read_rollouts(Path(desk.config.evidence.path)))
    matched = match(rollouts, desk.prompts(data, "pool"))
    desk.reporter.line(
        f"  imported {len(matched)} of {len(rollouts)} rollouts; the others belong to no prompt of the pool"
    )
    key = desk.store.key(
        "rollouts",
        imported=matched.prompt_uid,
        completions=[list(map(int, c)) for c in matched.completion_ids],
        logp=[list(map(float, x)) for x in matched.logp_old],
        verdicts=matched.verdict,
        rewards=list(map(float, matched.reward)),
    )
    if not desk.store.done(key):
        desk.store.trajectories.write(
            key, matched.columns(), {"policy": "imported", "split": "pool", "rollouts": len(matched)}
        )
    return [key]


def refresh(
    desk: Desk, policy: str, data: str, uids: Sequence[str], rollouts: Sequence[str], *, seed: int
) -> list[str]:
    """Collect ``evidence.rollouts`` more at ``policy`` for the prompts whose stored rollouts have gone stale.

    Stale are those of ``uids`` with fewer than ``evidence.refresh`` effective rollouts; 0 asks for none.
    """
    from pipeline.staleness import measure, stale

    settings = desk.config.evidence
    if not settings.refresh:
        return []
    key = desk.store.key(
        "staleness",
        policy=policy,
        adapter=desk.adapter,
        prompts=list(uids),
        rollouts=list(rollouts),
        recent=settings.recent,
    )
    if not desk.store.done(key):
        found = measure(
            desk.load(policy),
            evidence.read_rollouts_of(desk, rollouts, uids),
            micro_tokens=desk.config.policy.micro_tokens,
        )
        evidence.write_staleness(desk, key, [found])
    table, pool = desk.store.tables.read(key), desk.prompts(data, "pool")
    chosen = stale(dict(zip(table["prompt_uid"], table["effective"], strict=True)), settings.refresh)
    desk.reporter.line(f"  stale: {len(chosen)} of {len(uids)} prompts are collected anew")
    prompts = pool.take(pool.rows_of(chosen))
    return _collect(desk, policy, prompts, "pool", rollouts=settings.rollouts, seed=seed) if chosen else []


def _collect(desk: Desk, policy: str, prompts: Prompts, split: str, *, rollouts: int, seed: int) -> list[str]:
    """Commit a shard as soon as its last group is there; the groups of the others wait on disk, one by one."""
    shards = _shards(desk, policy, prompts, rollouts=rollouts, seed=seed)
    spool = Spool(desk.store.root / "spool")
    left = {key: set(shard.prompt_uid) - spool.read(key).keys() for key, shard in _open(desk, spool, shards).items()}
    meta = {"policy": policy, "split": split}
    for key in [key for key, uids in left.items() if not uids]:
        _commit(desk, spool, key, meta)
    home = {uid: key for key, uids in left.items() for uid in uids}
    missing = prompts.take(prompts.rows_of(list(home)))
    with desk.reporter.bar(f"collect {rollouts} rollouts a prompt, {split}", len(prompts)) as advance:
        advance(len(prompts) - len(missing))
        groups = evidence.stream(desk, policy, missing, rollouts=rollouts, seed=seed) if home else ()
        rate = Rate()
        for group in groups:
            uid = group.prompt_uid[0]
            spool.add(home[uid], group)
            left[home[uid]].discard(uid)
            if not left[home[uid]]:
                _commit(desk, spool, home[uid], meta)
            advance(1, rate(sum(map(len, group.completion_ids))))
    return list(shards)


def _shards(desk: Desk, policy: str, prompts: Prompts, *, rollouts: int, seed: int) -> dict[str, Prompts]:
    size, shards = desk.config.evidence.shard, {}
    for start in range(0, len(prompts), size):
        shard = prompts.take(range(start, min(start + size, len(prompts))))
        key = desk.store.key(
            "rollouts",
            policy=policy,
            rollouts=rollouts,
            seed=seed,
            chat=desk.config.policy.chat,
            prompts=shard.prompt_uid,
            verifiers=shard.verifier,
            sampling=desk.config.sampling.model_dump(),
            **desk.engines.identity(desk.engines.name(policy)),
        )
        shards[key] = shard
    return shards


def _open(desk: Desk, spool: Spool, shards: dict[str, Prompts]) -> dict[str, Prompts]:
    """Return the shards that are not in the store; what a kill left of the others is dropped."""
    done = {key for key in shards if desk.store.done(key)}
    for key in done:
        spool.drop(key)
    return {key: shard for key, shard in shards.items() if key not in done}


def _commit(desk: Desk, spool: Spool, key: str, meta: dict[str, str]) -> None:
    made = evidence.in_order(spool.read(key).values())
    desk.store.trajectories.write(key, made.columns(), {**meta, "rollouts": len(made)})
    spool.drop(key)
