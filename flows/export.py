"""What leaves a run: its stages and their controls as a dataset, with a manifest of where it came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flows import selections
from flows.arms import Arm, Stage, kept
from flows.config import load_config
from flows.desk import Desk
from flows.progress import Reporter

PATIENCE = 600.0  # seconds that an export waits for another one of the same run


def export(desk: Desk, data: str, curriculum: Arm) -> Path:
    """Write the stages and their controls as a dataset bundle that trainers read."""
    from stores.bundles import write_bundle

    stages = [_rows(desk, data, stage.selection, stage) for stage in curriculum.stages]
    random = [_rows(desk, data, stage.control, stage) for stage in curriculum.stages]
    with_images(stages + random)
    selection = selections.together(desk, [stage.selection for stage in curriculum.stages])
    folder, about = desk.folder / "export", (_manifest(desk, data, curriculum), _card(desk, curriculum))
    with desk.store.leases.hold(f"export {desk.config.name}", patience=PATIENCE):
        write_bundle(folder, stages, random, selection, *about)
    return folder


def export_kept(folder: Path, reporter: Reporter, seed: int | None = None) -> Path:
    """Write the bundle of the stages that are finished in a run directory, while its run may go on."""
    from flows.collecting import open_other

    config, store = load_config(folder / "config.toml"), open_other(folder)
    data, found, arm = kept(store, seed)
    return export(Desk(config.model_copy(update={"seed": found}), folder, store, None, reporter), data, arm)


def with_images(subsets: Sequence[dict[str, list[Any]]]) -> None:
    """Write the prompts of all subsets as parts, and their images beside them, where one of them is not plain text."""
    from pipeline.messages import for_trainers, is_plain

    if all(is_plain(messages) for columns in subsets for messages in columns["prompt"]):
        return
    for columns in subsets:
        pairs = [for_trainers(messages) for messages in columns["prompt"]]
        columns |= {"prompt": [turns for turns, _ in pairs], "images": [images for _, images in pairs]}


def _rows(desk: Desk, data: str, selection: str, stage: Stage) -> dict[str, list[Any]]:
    """Return one exported stage: prompts in rank order, with what was known of each."""
    table = selections.stage(desk, selection)
    uids = table["prompt_uid"]
    part = desk.of_pool(data, uids)
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
        "policy_id": [stage.policy] * len(uids),
        **{name: table[name] for name in known},
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
        "lineage": _lineage(desk, [s.selection for s in arm.stages]),
    }


def _lineage(desk: Desk, selections: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what the selections were made from, by key: its kind, its own inputs, and the code and settings."""
    from stores.lineage import lineage

    found = {key: facts for selection in selections for key, facts in lineage(desk.store, selection).items()}
    return {key: {name: facts[name] for name in ("kind", "inputs", "origin")} for key, facts in found.items()}


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
