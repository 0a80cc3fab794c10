"""The controls of a run: random subsets of the stages' sizes, and a shuffle of the whole pool for as many rollouts."""

from __future__ import annotations

import math

from flows.arms import Arm, Stage
from flows.do import Do
from flows.training import begin, train


def selection(do: Do, data: str, stage: Stage) -> str:
    """Return a random subset of the stage's size; the stage itself where that was already a shuffle."""
    if not stage.scores:
        return stage.selection
    size = do.desk.store.meta(stage.selection)["size"]
    return str(do("shuffle", data, [], stage.number, budget=size, seed=do.desk.seed("control", stage.number)))


def control(do: Do, data: str, start: str, selections: list[str]) -> Arm:
    """Train on random subsets of the size of the stages, for as many steps."""
    do.desk.reporter.heading("control: random subsets of equal size, equal steps")
    arm, policy, lengths = begin(do, "control", data, start), start, do.desk.config.train.stages
    for number, (selection, length) in enumerate(zip(selections, lengths, strict=True)):
        stage, before = Stage(number, selection, length, policy), dict(do.seconds)
        policy = train(do, arm, stage, data, policy, sum(lengths), "shuffle")
        stage.seconds = do.since(before)
    return arm


def random(do: Do, data: str, start: str, rollouts: int) -> Arm:
    """Train on a plain shuffle of the pool for as many rollouts as the curriculum spent, selection included."""
    settings = do.desk.config.train
    length = math.ceil(rollouts / (settings.batch * settings.rollouts))
    do.desk.reporter.heading(f"random: {length} steps on a shuffle, as many rollouts in all")
    arm = begin(do, "random", data, start)
    size = len(do.desk.pool(data))
    before = dict(do.seconds)
    stage = Stage(0, do("shuffle", data, [], 0, budget=size, seed=do.desk.seed("shuffle", 0)), length, start)
    train(do, arm, stage, data, start, length, "shuffle")
    stage.seconds = do.since(before)
    return arm
