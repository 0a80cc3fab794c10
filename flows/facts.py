"""What the report shows, gathered from the stores: distributions and examples that ``summary.json`` leaves out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from flows import evidence, selections, story, validity
from flows.arms import Arm, Stage
from flows.config import to_toml
from flows.desk import Desk
from pipeline.messages import plain_text

EXAMPLES = 8  # prompts shown at each end of a stage's order


def gather(desk: Desk, data: str, curriculum: Arm) -> dict[str, Any]:
    """Return the facts that ``pipeline.report.render`` takes, but for the summary of all seeds."""
    from pipeline.curriculum import overlap

    pool = desk.pool(data)
    scored = [stage for stage in curriculum.stages if stage.scores]
    before = curriculum.evidence if not scored else _evidence_before(desk, curriculum, scored[0])
    return {
        "name": desk.config.name,
        "stages": [_stage(desk, data, curriculum, stage) for stage in curriculum.stages],
        "overlap": overlap([selections.chosen(desk, stage.selection) for stage in curriculum.stages]).tolist(),
        "beliefs": {
            "before": _belief(desk, before, pool, "before the first selection"),
            "after": _belief(desk, curriculum.evidence, pool, "after the run"),
        },
        "diem": [facts for stage in curriculum.stages if (facts := _diem(desk, data, stage))],
        "full": next((desk.store.meta(s.full)["agreement"] for s in curriculum.stages if s.full), None),
        "validity": validity.stored(desk),
        "settings": to_toml(desk.config),
    }


def _evidence_before(desk: Desk, arm: Arm, first: Stage) -> list[str]:
    """Return the shards that were stored before the first stage that was scored."""
    later = {
        desk.store.meta(p)["rollouts_key"] for s in arm.stages if s.number >= first.number for _, p, _ in s.checkpoints
    }
    return [key for key in arm.evidence if key not in later]


def _belief(desk: Desk, keys: Sequence[str], uids: Sequence[str], label: str) -> dict[str, Any]:
    alpha, beta, counts = evidence.beliefs(desk, keys, uids)
    return {"label": label, "mean": (alpha / (alpha + beta)).tolist(), "n_obs": counts.sum(axis=0).tolist()}


def _stage(desk: Desk, data: str, arm: Arm, stage: Stage) -> dict[str, Any]:
    table = desk.store.curricula.read(stage.selection)
    targets = selections.targets_of(table)
    scored = [i for i, value in enumerate(table["score_influence"]) if value is not None]
    best = sorted(scored, key=lambda i: -max(table[name][i] for name in targets))
    return {
        "stage": stage.number,
        "drawn": dict(Counter(d for d in table["drawn"] if d)),
        "influence": {name.partition("_")[2]: [table[name][i] for i in scored] for name in targets},
        "reasons": dict(Counter(table["reason"])),
        "abilities": story.by_ability(desk, data, selections.chosen(desk, stage.selection)),
        "best": _examples(desk, data, arm, table, best[:EXAMPLES]),
        "worst": _examples(desk, data, arm, table, best[-EXAMPLES:][::-1]),
    }


def _examples(
    desk: Desk, data: str, arm: Arm, table: dict[str, list[Any]], rows: Sequence[int]
) -> list[dict[str, Any]]:
    uids = [table["prompt_uid"][i] for i in rows]
    shown = desk.of_pool(data, uids)
    stored = evidence.read_rollouts_of(desk, arm.evidence, uids)
    text = dict(zip(stored.prompt_uid, stored.text, strict=True))
    return [
        {
            "prompt_uid": uid,
            "prompt": "\n".join(plain_text(m["content"]) for m in json.loads(shown.messages[p])),
            "ability": shown.ability[p],
            "ground_truth": shown.ground_truth[p],
            "pass_rate": table["pass_rate"][i],
            "cosines": {n.partition("_")[2]: table[n][i] for n in selections.targets_of(table)},
            "completion": text.get(uid),
        }
        for p, (i, uid) in enumerate(zip(rows, uids, strict=True))
    ]


def _diem(desk: Desk, data: str, stage: Stage) -> dict[str, Any] | None:
    metas = [desk.store.meta(policy) for _, policy, _ in stage.checkpoints]
    metrics = [m for meta in metas for m in meta["metrics"] if "diem_deviation" in m]
    if not metrics:
        return None
    pool = desk.of_pool(data, list(dict.fromkeys(uid for meta in metas for step in meta["weights"] for uid in step)))
    ability = dict(zip(pool.prompt_uid, pool.ability, strict=True))
    weights: dict[str, list[float]] = {}
    for meta in metas:
        for step, facts in zip(meta["weights"], meta["metrics"], strict=True):
            for uid, w in step.items() if "diem_deviation" in facts else ():
                weights.setdefault(ability[uid], []).append(w)
    mean = {
        name: sum(m[name] for m in metrics) / len(metrics)
        for name in ("diem_effective_samples", "diem_cosine_to_plain", "clipped")
    }
    return {
        "stage": stage.number,
        "weights": weights,
        "identity": all(m["diem_identity"] for m in metrics),
        "effective_samples": mean["diem_effective_samples"],
        "prompts": desk.config.train.batch * sum(m["signal"] for m in metrics) / len(metrics),
        "clipped_share": mean["clipped"],
        "cosine_to_plain": mean["diem_cosine_to_plain"],
    }
