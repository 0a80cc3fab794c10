"""What a run comes to, read back from the stores: ``summary.json`` and ``metrics.jsonl``."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows import selections, story
from flows.arms import Arm, Stage
from flows.config import Config
from flows.desk import Desk

KINDS = {
    "final": "after the last step",
    "late": "mean over the last quarter of a run's evaluations",
    "mean": "mean over all of a run's evaluations after the start, evenly spaced over its own length",
}


def summarize(desk: Desk, data: str, arms: Sequence[Arm], seconds: dict[str, float]) -> dict[str, Any]:
    """Return the numbers of one seed: for each arm and stage what was spent, what was selected, how good it became."""
    return {
        "seed": desk.config.seed,
        "arms": {arm.name: _arm(desk, data, arm) for arm in arms},
        "excluded": dict(Counter(desk.excluded(data)[1].to_pylist())),
        "seconds": {name: round(s, 3) for name, s in seconds.items()},
    }


def combine(config: Config, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole summary: every seed, final levels with intervals, and paired differences to the controls."""
    from pipeline.evaluation import interval

    arms = list(seeds[0]["arms"])
    levels = {
        kind: {arm: _table(seeds, lambda s, arm=arm, kind=kind: s["arms"][arm][kind], interval) for arm in arms}
        for kind in KINDS
    }
    paired = {
        f"curriculum - {arm}": {
            kind: _table(
                seeds,
                lambda s, arm=arm, kind=kind: _minus(s["arms"]["curriculum"][kind], s["arms"][arm][kind]),
                interval,
            )
            for kind in KINDS
        }
        for arm in arms
        if arm != "curriculum"
    }
    return {
        "name": config.name,
        "version": version("influent"),
        "seeds": [s["seed"] for s in seeds],
        **levels,
        **{f"{kind}_is": meaning for kind, meaning in KINDS.items()},
        "paired_differences": paired,
        "runs": list(seeds),
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_metrics(folder: Path, desk: Desk, arms: Sequence[Arm], *, append: bool) -> None:
    """Write one line an optimizer step, and one an evaluation."""
    lines = [
        json.dumps(row, sort_keys=True)
        for arm in arms
        for stage in arm.stages
        for checkpoint in stage.checkpoints
        for row in rows(desk, arm.name, stage.number, checkpoint)
    ]
    with (folder / "metrics.jsonl").open("a" if append else "w") as file:
        file.write("".join(line + "\n" for line in lines))


def rows(desk: Desk, arm: str, stage: int, checkpoint: tuple[int, str, str]) -> list[dict[str, Any]]:
    """Return what a checkpoint adds to the metrics: a row an optimizer step, and then one of the evaluation."""
    step, policy, evaluation = checkpoint
    where = {"seed": desk.config.seed, "arm": arm, "stage": stage}
    steps = [where | metrics for metrics in desk.store.meta(policy)["metrics"]]
    return [*steps, where | {"step": step, "evaluation": desk.store.meta(evaluation)["sets"]}]


def _arm(desk: Desk, data: str, arm: Arm) -> dict[str, Any]:
    sets = desk.store.meta(arm.start_evaluation)["sets"]
    curve = [{"step": 0, "rollouts": arm.collected, "sets": sets}]
    stages = []
    spent = arm.collected
    for stage in arm.stages:
        spent += stage.rollouts_select
        each = stage.rollouts_train / stage.steps
        begin = curve[-1]["step"]
        for step, _, evaluation in stage.checkpoints:
            rollouts = int(spent + each * (step - begin))
            curve.append({"step": step, "rollouts": rollouts, "sets": desk.store.meta(evaluation)["sets"]})
        spent += stage.rollouts_train
        stages.append(_stage(desk, data, stage, curve[-1]["sets"]))
    return {
        "rollouts": arm.rollouts,
        "steps": curve[-1]["step"],
        "start": sets,
        "final": curve[-1]["sets"],
        "late": _mean(curve[-max(1, len(curve) // 4) :]),
        "mean": _mean(curve[1:]),
        "curve": curve,
        "stages": stages,
    }


def _mean(curve: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the mean level over some evaluations, which are evenly spaced in a run's own steps."""
    sets = curve[0]["sets"]
    return {s: {m: sum(p["sets"][s][m] for p in curve) / len(curve) for m in sets[s]} for s in sets}


def _stage(desk: Desk, data: str, stage: Stage, level: dict[str, Any]) -> dict[str, Any]:
    picked = selections.chosen(desk, stage.selection)
    metrics = [m for _, policy, _ in stage.checkpoints for m in desk.store.meta(policy)["metrics"]]
    return {
        "stage": stage.number,
        "steps": stage.steps,
        "selected": len(picked),
        "selected_by_ability": story.by_ability(desk, data, picked),
        "by_reason": dict(selections.reasons(desk, stage.selection)),
        "rollouts": {"train": stage.rollouts_train, "select": stage.rollouts_select},
        "refreshed": stage.rollouts_refresh,
        "cascade": stage.cascade,
        "level": level,
        "groups_with_signal": sum(m["signal"] for m in metrics) / len(metrics),
        "diem_identity": all(m.get("diem_identity", True) for m in metrics),
        "seconds": {name: round(s, 3) for name, s in stage.seconds.items()},
    }


def _minus(a: dict[str, dict[str, float]], b: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {split: {name: a[split][name] - b[split][name] for name in a[split]} for split in a}


def _table(seeds: Sequence[dict[str, Any]], of: Any, interval: Any) -> dict[str, Any]:
    rows = [of(s) for s in seeds]
    return {split: {name: interval([row[split][name] for row in rows]) for name in rows[0][split]} for split in rows[0]}
