"""What a run comes to, read back from the stores: ``summary.json``, ``metrics.jsonl`` and the exported dataset."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows import evidence, story
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
        "excluded": dict(Counter(desk.excluded(data).values())),
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
    lines = []
    for arm in arms:
        for stage in arm.stages:
            for step, policy, evaluation in stage.checkpoints:
                where = {"seed": desk.config.seed, "arm": arm.name, "stage": stage.number}
                lines += [json.dumps(where | m, sort_keys=True) for m in desk.store.meta(policy)["metrics"]]
                lines.append(
                    json.dumps(
                        where | {"step": step, "evaluation": desk.store.meta(evaluation)["sets"]}, sort_keys=True
                    )
                )
    with (folder / "metrics.jsonl").open("a" if append else "w") as file:
        file.write("".join(line + "\n" for line in lines))


def export(desk: Desk, data: str, curriculum: Arm, controls: Sequence[str]) -> Path:
    """Write the stages and their controls as a dataset bundle that trainers read."""
    from stores.bundles import write_bundle

    stages = [_rows(desk, data, stage.selection, curriculum, stage) for stage in curriculum.stages]
    random = [_rows(desk, data, key, curriculum, stage) for key, stage in zip(controls, curriculum.stages, strict=True)]
    with_images(stages + random)
    tables = [desk.store.curricula.read(stage.selection) for stage in curriculum.stages]
    names = list(dict.fromkeys(name for table in tables for name in table))
    selection = {name: [v for t in tables for v in t.get(name, [None] * len(t["stage"]))] for name in names}
    folder = desk.folder / "export"
    write_bundle(folder, stages, random, selection, _manifest(desk, data, curriculum), _card(desk, curriculum))
    return folder


def with_images(subsets: Sequence[dict[str, list[Any]]]) -> None:
    """Write the prompts of all subsets as parts, and their images beside them, where one of them is not plain text."""
    from pipeline.messages import for_trainers, is_plain

    if all(is_plain(messages) for columns in subsets for messages in columns["prompt"]):
        return
    for columns in subsets:
        pairs = [for_trainers(messages) for messages in columns["prompt"]]
        columns |= {"prompt": [turns for turns, _ in pairs], "images": [images for _, images in pairs]}


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
    picked = evidence.chosen(desk, stage.selection)
    table = desk.store.curricula.read(stage.selection)
    metrics = [m for _, policy, _ in stage.checkpoints for m in desk.store.meta(policy)["metrics"]]
    return {
        "stage": stage.number,
        "steps": stage.steps,
        "selected": len(picked),
        "selected_by_ability": story.by_ability(desk, data, picked),
        "by_reason": dict(Counter(table["reason"])),
        "rollouts": {"train": stage.rollouts_train, "select": stage.rollouts_select},
        "refreshed": stage.rollouts_refresh,
        "cascade": stage.cascade,
        "level": level,
        "groups_with_signal": sum(m["signal"] for m in metrics) / len(metrics),
        "diem_identity": all(m.get("diem_identity", True) for m in metrics),
        "seconds": {name: round(s, 3) for name, s in stage.seconds.items()},
    }


def _rows(desk: Desk, data: str, selection: str, arm: Arm, stage: Stage) -> dict[str, list[Any]]:
    """Return one exported stage: prompts in rank order, with what was known of each."""
    pool, table = desk.prompts(data, "pool"), desk.store.curricula.read(selection)
    row = {uid: i for i, uid in enumerate(table["prompt_uid"])}
    uids = evidence.chosen(desk, selection)
    part, at = pool.take(pool.rows_of(uids)), [row[uid] for uid in uids]
    policy = arm.start if stage.number == 0 else arm.stages[stage.number - 1].checkpoints[-1][1]
    known = ("score_influence", "score_wmi", "pass_rate", "alpha", "beta", "n_obs", "ess", "log_ratio_p99")
    return {
        "prompt_uid": uids,
        "prompt": [json.loads(m) for m in part.messages],
        "solution": list(part.ground_truth),
        "ground_truth": list(part.ground_truth),
        "data_source": list(part.data_source),
        "ability": list(part.ability),
        "reward_spec": list(part.verifier),
        "stage": [stage.number] * len(uids),
        "rank": list(range(len(uids))),
        "weight": [1.0] * len(uids),
        "policy_id": [policy] * len(uids),
        **{name: [table[name][i] for i in at] for name in known},
    }


def _manifest(desk: Desk, data: str, arm: Arm) -> dict[str, Any]:
    settings = desk.config.model_dump(mode="json")
    return {
        "tool": f"influent {version('influent')}",
        "name": desk.config.name,
        "seed": desk.config.seed,
        "prompts": data,
        "start_policy": arm.start,
        "settings": {
            name: settings[name]
            for name in ("policy", "prompts", "sampling", "evidence", "beliefs", "features", "select", "insight")
        },
        "stages": [
            {"stage": s.number, "selection": s.selection, "scores": s.scores, "rollouts": {"select": s.rollouts_select}}
            for s in arm.stages
        ],
    }


def _card(desk: Desk, arm: Arm) -> str:
    lines = [
        f"# {desk.config.name}: a staged curriculum",
        "",
        "Selected by Influent: off-policy influence on the validation sets (CROPI), with a random floor.",
        "Each stage has a random control of equal size, `control_NN`. `selection.parquet` holds every prompt of",
        "the pool with its scores and one reason code, without text.",
        "",
        "| stage | prompts | selected from |",
        "|---|---|---|",
    ]
    for stage in arm.stages:
        how = "influence and floor" if stage.scores else "shuffle"
        lines.append(f"| stage_{stage.number:02d} | {desk.store.meta(stage.selection)['size']} | {how} |")
    lines += [
        "",
        "```python",
        "from datasets import load_dataset",
        'load_dataset("<this folder>", "stage_00")',
        "```",
        "",
    ]
    return "\n".join(lines)


def _minus(a: dict[str, dict[str, float]], b: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {split: {name: a[split][name] - b[split][name] for name in a[split]} for split in a}


def _table(seeds: Sequence[dict[str, Any]], of: Any, interval: Any) -> dict[str, Any]:
    rows = [of(s) for s in seeds]
    return {split: {name: interval([row[split][name] for row in rows]) for name in rows[0][split]} for split in rows[0]}
