"""What every arm of a run does: begin with a measurement, and train stage after stage."""

from __future__ import annotations

from flows import story
from flows.arms import Arm, Stage
from flows.do import Do


def begin(do: Do, name: str, data: str, start: str) -> Arm:
    """Return an arm that has trained nothing yet; its start is measured."""
    return Arm(name, start, do("evaluate", start, data, _splits(do, data)))


def train(do: Do, arm: Arm, stage: Stage, data: str, policy: str, total: int, sampler: str) -> str:
    """Train a stage, measuring each checkpoint, and return the last; ``total`` is the steps of all stages."""
    desk, every = do.desk, do.desk.config.train.save_every
    start = sum(s.steps for s in arm.stages)
    with desk.reporter.bar(f"train {arm.name}, stage {stage.number}", stage.steps) as desk.advance:
        for first in range(start, start + stage.steps, every):
            count = min(every, start + stage.steps - first)
            policy = do(
                "train",
                policy,
                data,
                stage.selection,
                list(arm.evidence),
                targets=stage.targets or None,
                way=stage.way,
                sampler=sampler,
                first=first,
                steps=count,
                stage_start=start,
                total=total,
            )
            meta = desk.store.meta(policy)
            arm.evidence.append(meta["rollouts_key"])
            stage.rollouts_train += meta["rollouts"]
            stage.checkpoints.append((first + count, policy, do("evaluate", policy, data, _splits(do, data))))
            desk.report(arm.name, stage.number, stage.checkpoints[-1])
    arm.stages.append(stage)
    story.tell_level(desk, arm, stage)
    return policy


def _splits(do: Do, data: str) -> list[str]:
    return [split for split in do.desk.splits(data) if split != "pool"]
