"""From a pool to one subset: collect, compare, select, export, and train nothing. For those who train elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows import story
from flows.arms import Arm, keep
from flows.config import Config
from flows.curriculum import gather, publish, select
from flows.do import Wrap, doing
from flows.export import export
from flows.progress import Reporter
from flows.run import open_desk, plain
from flows.windows import Windows


def curate(
    config: Config,
    folder: Path,
    reporter: Reporter,
    *,
    checkpoint: str = "",
    wrap: Wrap = plain,
    windows: Windows | None = None,
    patience: float = 0.0,
) -> dict[str, Any]:
    """Select one stage for the policy as it is, and export it with its random twin; returns the key and the folder.

    Args:
        config: the settings. Where rollouts would come from a first stage of training, they are collected.
        folder: the run directory.
        reporter: shows progress.
        checkpoint: folder or name of the policy, in the place of the settings'.
        wrap: turns a step's name and callable into the callable to use.
        windows: what others see of the run.
        patience: seconds to wait for another process that is at work in the directory.
    """
    if checkpoint:
        policy = config.policy.model_copy(update={"checkpoint": checkpoint})
        config = config.model_copy(update={"policy": policy})
    with open_desk(config, folder, reporter, windows, patience=patience) as desk, doing(desk, wrap) as do:
        reporter.heading(f"curate for {config.policy.checkpoint}, seed {config.seed}")
        start = do("start_policy")
        data = do("prompts", start)
        story.tell_prompts(desk, data)
        arm = Arm("curriculum", start, "")
        collects = config.evidence.source == "first_stage"
        if collects:
            reporter.line("  evidence.source = 'first_stage', and nothing is trained here: rollouts are collected")
        do.stage = 0
        gather(do, arm, data, "collect" if collects else config.evidence.source)
        stage = select(do, arm, data, start, 0)
        publish(do, data, stage)
        arm.stages.append(stage)
        place = folder / "export"
        if keep(desk, data, arm) or not place.exists():  # else it would take the place of a newer one
            export(desk, data, arm)
        result = {"selection": stage.selection, "control": stage.control, "export": str(place.absolute())}
        desk.windows.ended(config, result)
    return result
