"""The steps that bring rollouts into the store: collected, imported, and collected anew where they have gone stale."""

from __future__ import annotations

from collections.abc import Sequence

from flows import evidence
from flows.desk import Desk
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
    size, keys = desk.config.evidence.shard, []
    with desk.reporter.bar(f"collect {rollouts} rollouts a prompt, {split}", len(prompts)) as advance:
        for start in range(0, len(prompts), size):
            shard = prompts.take(range(start, min(start + size, len(prompts))))
            identity = {
                "prompts": shard.prompt_uid,
                "verifiers": shard.verifier,
                "sampling": desk.config.sampling.model_dump(),
            }
            keys.append(
                desk.store.key(
                    "rollouts", policy=policy, rollouts=rollouts, seed=seed, chat=desk.config.policy.chat, **identity
                )
            )
            if not desk.store.done(keys[-1]):
                made = evidence.roll(desk, policy, shard, rollouts=rollouts, seed=seed, step=0)
                desk.store.trajectories.write(
                    keys[-1], made.columns(), {"policy": policy, "split": split, "rollouts": len(made)}
                )
            advance(len(shard))
    return keys
