"""The steps that bring rollouts into the store: collected, imported, scored again, collected anew where stale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows import evidence
from flows.config import load_config
from flows.desk import Desk
from flows.progress import Rate
from pipeline.records import Prompts, Rollouts
from stores.errors import Damaged

if TYPE_CHECKING:
    from stores.store import Store


def collect(
    desk: Desk, policy: str, data: str, split: str, *, rollouts: int, seed: int, uids: Sequence[str] | None = None
) -> list[str]:
    """Sample and score ``rollouts`` completions of each prompt of a split, or of its ``uids``; one key a shard."""
    return _collect(desk, policy, asked(desk, data, split, uids), split, rollouts=rollouts, seed=seed)


def asked(desk: Desk, data: str, split: str, uids: Sequence[str] | None) -> Prompts:
    """Return the prompts of a split, or those of it that ``uids`` name."""
    prompts = desk.prompts(data, split)
    return prompts if uids is None else prompts.take(prompts.rows_of(uids))


def import_rollouts(desk: Desk, data: str) -> list[str]:
    """Bring in rollouts made elsewhere, joined to the pool by prompt_uid; what does not match is counted."""
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
            key,
            matched.columns(),
            {"policy": "imported", "split": "pool", "rollouts": len(matched), "verifiers": {"imported": "unknown"}},
        )
    return [key]


def rescore(desk: Desk, data: str) -> list[str]:
    """Score the pool's rollouts that another run has stored with this run's verifiers; no rollout is made.

    Each shard becomes one of this run, with counts of its own; the other run keeps its shards as they are. What the
    other run has for prompts that are not in this pool is counted and left out.
    """
    from pipeline.rescoring import changes, versions
    from pipeline.rescoring import rescore as score_again

    pool, keys, changed, left = desk.prompts(data, "pool"), [], Counter[str](), 0
    known, folder = set(pool.prompt_uid), Path(desk.config.evidence.path)
    other = open_other(folder)
    if desk.config.catalog and desk.config.catalog == load_config(folder / "config.toml").catalog:
        raise ValueError(
            f"catalog = {desk.config.catalog!r} is that of {str(folder)!r} too, and does not tell whose rollouts are "
            "whose: give this run a catalog of its own"
        )
    shards = [key for key in other.catalog.keys("trajectories") if other.meta(key).get("split") == "pool"]
    with desk.reporter.bar("score stored rollouts again, shards", len(shards)) as advance:
        for shard in shards:
            stored = Rollouts.of(other.trajectories.read([shard]))
            rollouts = stored.take([i for i, uid in enumerate(stored.prompt_uid) if uid in known])
            left += len(stored) - len(rollouts)
            if len(rollouts):
                prompts = pool.take(pool.rows_of(rollouts.groups()))
                judges = versions(prompts.verifier)
                key = desk.store.key(
                    "rollouts", rescored=shard, prompts=prompts.prompt_uid, by=prompts.verifier, verifiers=judges
                )
                if not desk.store.done(key):
                    made = score_again(rollouts, prompts, desk.verifiers.score)
                    facts = {"policy": other.meta(shard)["policy"], "split": "pool", "rollouts": len(made)}
                    facts |= {"rescored": shard, "verifiers": judges, "changes": changes(rollouts, made)}
                    desk.store.trajectories.write(key, made.columns(), facts)
                changed.update(desk.store.meta(key)["changes"])
                keys.append(key)
            advance(1)
    told = ", ".join(f"{n} {change}" for change, n in sorted(changed.items())) or "no verdict changed"
    desk.reporter.line(f"  {told}; {left} rollouts belong to no prompt of this pool")
    if not keys:
        raise ValueError(
            f"evidence.path = {desk.config.evidence.path!r} holds no rollout of this pool's {len(pool)} prompts: "
            "prompt_uid is the hash of (messages, ground truth, data source), so keep these three as they were"
        )
    return keys


def open_other(folder: Path) -> Store:
    """Open the store of another run's directory."""
    from stores import open_store

    if not (folder / "store").is_dir():
        raise FileNotFoundError(f"{str(folder)!r} holds no store: give the directory of a run, such as runs/demo")
    config = load_config(folder / "config.toml")
    return open_store(folder / "store", config.catalog or None, config.objects or None)


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
    shards = shards_of(desk, policy, prompts, rollouts=rollouts, seed=seed)
    spool = desk.store.spool
    left = {key: set(shard.prompt_uid) - spool.read(key).keys() for key, shard in _open(desk, shards).items()}
    meta = {"policy": policy, "split": split}
    for key in [key for key, uids in left.items() if not uids]:
        _commit(desk, key, meta, shards[key])
    home = {uid: key for key, uids in left.items() for uid in uids}
    missing = prompts.take(prompts.rows_of(list(home)))
    with desk.reporter.bar(f"collect {rollouts} rollouts a prompt, {split}", len(prompts)) as advance:
        advance(len(prompts) - len(missing))
        groups = evidence.stream(desk, policy, missing, rollouts=rollouts, seed=seed) if home else ()
        rate = Rate()
        for group in groups:
            uid = group.prompt_uid[0]
            spool.add(home[uid], uid, group.columns())
            left[home[uid]].discard(uid)
            if not left[home[uid]]:
                _commit(desk, home[uid], meta, shards[home[uid]])
            advance(1, rate(sum(map(len, group.completion_ids))))
    return list(shards)


def shards_of(desk: Desk, policy: str, prompts: Prompts, *, rollouts: int, seed: int) -> dict[str, Prompts]:
    """Return the shards that a collection makes, and the prompts of each, in their order."""
    from pipeline.rescoring import versions

    size, shards = desk.config.evidence.shard, {}
    for start in range(0, len(prompts), size):
        shard = prompts.take(range(start, min(start + size, len(prompts))))
        key = desk.store.key(
            "rollouts",
            policy=policy,
            rollouts=rollouts,
            seed=seed,
            chat=desk.rendering,
            prompts=shard.prompt_uid,
            verifiers=shard.verifier,
            versions=versions(shard.verifier),
            sampling=desk.config.sampling.model_dump(),
            **desk.engines.identity(desk.engines.name(policy)),
        )
        shards[key] = shard
    return shards


def _open(desk: Desk, shards: dict[str, Prompts]) -> dict[str, Prompts]:
    """Return the shards that are not in the store; what a kill left of the others is dropped."""
    done = {key for key in shards if desk.store.done(key)}
    for key in done:
        desk.store.spool.drop(key)
    return {key: shard for key, shard in shards.items() if key not in done}


def _commit(desk: Desk, key: str, meta: dict[str, str], shard: Prompts) -> None:
    from pipeline.rescoring import versions

    groups = desk.store.spool.read(key)
    if groups.keys() != set(shard.prompt_uid):
        raise Damaged(
            f"{desk.store.spool.file(key)} holds {len(groups)} of the {len(shard)} groups that were added to it; run "
            "the same command again: what is missing is sampled again"
        )
    made = evidence.in_order(Rollouts.of(columns) for columns in groups.values())
    facts = meta | {"rollouts": len(made), "verifiers": versions(shard.verifier)}
    desk.store.trajectories.write(key, made.columns(), facts)
    desk.store.spool.drop(key)
