"""What a run says about itself as it goes: what was left out, what was selected and why, how good the policy is now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flows import selections
from flows.desk import Desk

if TYPE_CHECKING:
    from flows.arms import Arm, Stage

MANY = 1024  # shards of a pool from which on their book-keeping is felt: each generation names all of them


def count_rollouts(desk: Desk, keys: Sequence[str]) -> int:
    """Return how many rollouts the given shards hold."""
    return sum(int(desk.store.meta(key)["rollouts"]) for key in keys)


def tell_prompts(desk: Desk, data: str) -> None:
    """Say how many prompts each set has."""
    sizes = desk.splits(data).items()
    desk.reporter.line("  prompts: " + ", ".join(f"{split} {size}" for split, size in sizes if size))
    shards = len(desk.pool(data)) // desk.config.evidence.shard
    if shards > MANY:
        desk.reporter.line(
            f"  evidence.shard = {desk.config.evidence.shard} makes {shards:,} shards, and as many commits: set it to "
            f"{len(desk.pool(data)) // MANY + 1:,} or more for a pool of this size"
        )


def tell_cascade(desk: Desk, cascade: Mapping[str, Any]) -> None:
    """Say what the free filters left out, and what share of the stored tokens costs no backward pass for it."""
    counts = ", ".join(f"{n} {reason}" for reason, n in cascade["prompts"].items()) or "none"
    saved = sum(cascade["tokens"].values())
    share = saved / max(1, saved + cascade["tokens_left"])
    desk.reporter.line(f"  left out before any gradient: {counts}; {cascade['prompts_left']} prompts get one")
    desk.reporter.line(f"  {saved:,} stored completion tokens, {share:.0%}, cost no backward pass")


def by_ability(desk: Desk, data: str, uids: Sequence[str]) -> dict[str, int]:
    """Return the number of prompts of each ability, largest first."""
    return dict(Counter(desk.of_pool(data, uids).ability).most_common())


def tell_selection(desk: Desk, data: str, stage: Stage) -> None:
    """Say how many were selected, by ability, by reason, and show the best aligned."""
    found = selections.reasons(desk, stage.selection)
    picked = selections.chosen(desk, stage.selection)
    reasons = ", ".join(f"{n} {reason}" for reason, n in found.most_common())
    desk.reporter.line(f"  selected {len(picked)} of {found.total()} prompts ({reasons})")
    families = ", ".join(f"{name} {n}" for name, n in by_ability(desk, data, picked).items())
    desk.reporter.line(f"  of which: {families}")
    if stage.scores:
        _tell_best(desk, data, selections.stage(desk, stage.selection))


def tell_level(desk: Desk, arm: Arm, stage: Stage) -> None:
    """Say how good the policy is after a stage, beside where it started."""
    start, now = (desk.store.meta(key)["sets"] for key in (arm.start_evaluation, stage.checkpoints[-1][2]))
    desk.reporter.line(f"  after {arm.rollouts:,} rollouts")
    for split, level in now.items():
        facts = [f"{name.replace('_', ' ')} {start[split][name]:.3f} -> {value:.3f}" for name, value in level.items()]
        desk.reporter.line(f"    {split}: " + ", ".join(facts))
    metrics = [
        m for _, policy, _ in stage.checkpoints for m in desk.store.meta(policy)["metrics"] if "diem_deviation" in m
    ]
    if metrics:
        desk.reporter.line("  " + _diem(metrics))


def _diem(metrics: list[dict[str, Any]]) -> str:
    if all(m["diem_identity"] for m in metrics):
        return "DIEM: every weight is one; these steps are plain GRPO"
    mean = {
        name: sum(m[f"diem_{name}"] for m in metrics) / len(metrics)
        for name in ("deviation", "effective_samples", "cosine_to_plain")
    }
    clipped = sum(m["clipped"] for m in metrics)
    return (
        f"DIEM: largest |W - 1| {mean['deviation']:.2f}, effective prompts {mean['effective_samples']:.1f}, cosine to "
        f"the plain step {mean['cosine_to_plain']:.2f}; the gradient was clipped in {clipped} of {len(metrics)} steps"
    )


def _tell_best(desk: Desk, data: str, table: Mapping[str, list[Any]]) -> None:
    stage, targets, lines = desk.of_pool(data, table["prompt_uid"]), selections.targets_of(table), []
    for i in range(min(3, len(stage))):
        if table["score_influence"][i] is not None:
            cosines = [f"{table[name][i]:+.2f}" for name in targets]
            lines.append([_excerpt(stage.messages[i]), stage.ability[i], *cosines, f"{table['pass_rate'][i]:.2f}"])
    names = [name.partition("_")[2] for name in targets]
    desk.reporter.table("  best aligned", ["prompt", "ability", *(f"cos {n}" for n in names), "pass rate"], lines)


def _excerpt(messages: str, width: int = 40) -> str:
    import json

    from pipeline.messages import plain_text

    text = " ".join(plain_text(json.loads(messages)[-1]["content"]).split())
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= width else "…" + clean[1 - width :]  # the end: few-shot prompts begin alike
