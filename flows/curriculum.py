"""The loop: evidence, then for each stage select, train, evaluate; beside it the controls.

Nothing here computes: it orders steps and hands keys on. ``do`` is the set of steps, plain or wrapped as Prefect tasks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from flows import collecting, evidence, full, gradients, prepare, steps, story
from flows.arms import Arm, Stage
from flows.desk import Desk

STEPS: dict[str, Callable[..., Any]] = {
    "start_policy": prepare.start_policy,
    "prompts": prepare.prompts,
    "collect": collecting.collect,
    "import_rollouts": collecting.import_rollouts,
    "rescore": collecting.rescore,
    "refresh": collecting.refresh,
    "featurize": gradients.featurize,
    "score": gradients.score,
    "score_directional": gradients.score_directional,
    "score_full": full.score_full,
    "select": steps.select,
    "shuffle": steps.shuffle,
    "train": steps.train,
    "evaluate": steps.evaluate,
}


_TOGETHER = {
    **{name: {name} for name in STEPS},
    "train": {"train", "evaluate"},  # a stage is trained and evaluated by turns
    "evaluate": {"train", "evaluate"},
}


class Reached(Exception):
    """Ends the loop after the step that a single command asked for; carries its keys."""

    def __init__(self, keys: list[str]) -> None:
        super().__init__(keys)
        self.keys = keys


class Do:
    """The steps of a run, each called by name, timed, and wrapped by ``wrap`` (which Prefect provides).

    Args:
        desk: what the steps need.
        wrap: turns a step's name and callable into the callable to use.
        until: (step, stage) after which the loop ends: before the next step of another kind.
    """

    def __init__(
        self,
        desk: Desk,
        wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]],
        until: tuple[str, int] | None = None,
    ) -> None:
        self.desk, self.until, self.stage = desk, until, -1  # -1: before the first stage
        self.found: list[str] = []  # keys of the step that ``until`` names
        self.seconds: dict[str, float] = {}
        self._steps = {name: wrap(name, partial(step, desk)) for name, step in STEPS.items()}

    def __call__(self, step: str, *args: Any, **kwargs: Any) -> Any:
        """Run a step, and add what it took to the seconds of its kind."""
        if self.found and step not in _TOGETHER.get(self.until[0] if self.until else "", {step}):
            raise Reached(self.found)
        began = time.perf_counter()
        key = self._steps[step](*args, **kwargs)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - began
        if self.until == (step, self.stage):
            self.found += key if isinstance(key, list) else [key]
        return key

    def since(self, before: dict[str, float]) -> dict[str, float]:
        """Return the seconds of each kind of step since ``before``, a copy of ``seconds``."""
        spent = {name: s - before.get(name, 0.0) for name, s in self.seconds.items()}
        return {name: s for name, s in spent.items() if s > 0}


def run_seed(do: Do) -> tuple[str, list[Arm], list[str]]:
    """Run the curriculum and its controls for one seed; returns the prompts' key, the arms, the control selections."""
    desk = do.desk
    desk.reporter.heading(f"prepare, seed {desk.config.seed}")
    start = do("start_policy")
    data = do("prompts", start)
    story.tell_prompts(desk, data)
    curriculum = run_curriculum(do, data, start)
    if do.found:  # the controls' steps are not those of a stage
        raise Reached(do.found)
    controls = [_control_selection(do, data, stage) for stage in curriculum.stages]
    arms = [curriculum]
    if desk.config.controls:
        arms.append(_control(do, data, start, controls))
        arms.append(_random(do, data, start, curriculum.rollouts))
    return data, arms, controls


def _begin(do: Do, name: str, data: str, start: str) -> Arm:
    return Arm(name, start, do("evaluate", start, data, _splits(do, data)))


def _splits(do: Do, data: str) -> list[str]:
    return [split for split in do.desk.splits(data) if split != "pool"]


def run_curriculum(do: Do, data: str, start: str) -> Arm:
    """Run the stages of the curriculum alone."""
    desk, config = do.desk, do.desk.config
    arm = _begin(do, "curriculum", data, start)
    do.stage = 0
    if config.evidence.source == "collect":
        seed = desk.seed("collect")
        arm.evidence = do("collect", start, data, "pool", rollouts=config.evidence.rollouts, seed=seed)
        arm.collected = story.count_rollouts(desk, arm.evidence)
    elif config.evidence.source == "import":
        arm.evidence = do("import_rollouts", data)
    elif config.evidence.source == "rescore":
        arm.evidence = do("rescore", data)
    policy = start
    for number, length in enumerate(config.train.stages):
        do.stage = number
        desk.reporter.heading(f"stage {number} of {len(config.train.stages)}, curriculum")
        before = dict(do.seconds)
        if arm.evidence:
            stage = _select(do, arm, data, policy, number, length)
        else:
            desk.reporter.line("  no stored rollouts yet: this stage trains on a shuffle, and is the collection")
            budget = min(length * config.train.batch, len(desk.pool(data)))
            stage = Stage(
                number, do("shuffle", data, [], number, budget=budget, seed=desk.seed("shuffle", number)), length
            )
        story.tell_selection(desk, data, stage)
        if config.diem.strength > 0 and config.diem.reference != "validation":
            stage.way = gradients.way(desk, policy)
        policy = _train(
            do, arm, stage, data, policy, sum(config.train.stages), config.train.sampler if stage.scores else "shuffle"
        )
        stage.seconds = do.since(before)
    return arm


def _select(do: Do, arm: Arm, data: str, policy: str, number: int, length: int) -> Stage:
    desk, config = do.desk, do.desk.config
    stage, seed, fresh = Stage(number, "", length), desk.seed("validation", number), {}
    for split in desk.validation(data):
        fresh[split] = do("collect", policy, data, split, rollouts=config.evidence.validation_rollouts, seed=seed)
        stage.rollouts_select += story.count_rollouts(desk, fresh[split])
    uids_of = {split: desk.prompts(data, split).prompt_uid for split in fresh}
    found = evidence.cascade(desk, data, arm.evidence)
    stage.cascade = found.facts
    story.tell_cascade(desk, stage.cascade)
    renewed = do("refresh", policy, data, found.left, list(arm.evidence), seed=desk.seed("refresh", number))
    arm.evidence += renewed
    stage.rollouts_refresh = story.count_rollouts(desk, renewed)
    stage.rollouts_select += stage.rollouts_refresh
    targets: dict[str, tuple[list[str], int]] = {}
    aims = {split: (uids, fresh[split]) for split, uids in uids_of.items()}
    if config.features.score == "directional":
        stage.scores = do("score_directional", policy, found.left, arm.evidence, aims)
    else:
        targets = _targets(do, policy, uids_of, fresh, "features")
        stage.scores = do("score", do("featurize", policy, found.left, arm.evidence, "pool"), targets)
    if config.features.compare_full and policy == arm.start:
        stage.full = do("score_full", policy, found.left, arm.evidence, aims, stage.scores)
    if config.diem.strength > 0 and config.diem.reference == "validation":
        stage.way = gradients.way(desk, policy)
        shared = targets and gradients.is_that_of_features(desk, policy, stage.way)
        stage.targets = targets if shared else _targets(do, policy, uids_of, fresh, stage.way)
    stage.selection = do("select", data, arm.evidence, found.reason, stage.scores, number)
    return stage


def _targets(
    do: Do, policy: str, uids_of: dict[str, tuple[str, ...]], fresh: dict[str, list[str]], space: str
) -> dict[str, tuple[list[str], int]]:
    """Return the generations of each validation set's gradients in a space, and the sizes of the sets."""
    return {
        split: (do("featurize", policy, uids, fresh[split], split, name=space), len(uids))
        for split, uids in uids_of.items()
    }


def _train(do: Do, arm: Arm, stage: Stage, data: str, policy: str, total: int, sampler: str) -> str:
    desk, every = do.desk, do.desk.config.train.save_every
    begin = sum(s.steps for s in arm.stages)
    with desk.reporter.bar(f"train {arm.name}, stage {stage.number}", stage.steps) as desk.advance:
        for first in range(begin, begin + stage.steps, every):
            count = min(every, begin + stage.steps - first)
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
                stage_start=begin,
                total=total,
            )
            meta = desk.store.meta(policy)
            arm.evidence.append(meta["rollouts_key"])
            stage.rollouts_train += meta["rollouts"]
            stage.checkpoints.append((first + count, policy, do("evaluate", policy, data, _splits(do, data))))
    arm.stages.append(stage)
    story.tell_level(desk, arm, stage)
    return policy


def _control_selection(do: Do, data: str, stage: Stage) -> str:
    """Return a random subset of the stage's size; the stage itself where that was already a shuffle."""
    if not stage.scores:
        return stage.selection
    size = do.desk.store.meta(stage.selection)["size"]
    return str(do("shuffle", data, [], stage.number, budget=size, seed=do.desk.seed("control", stage.number)))


def _control(do: Do, data: str, start: str, selections: list[str]) -> Arm:
    do.desk.reporter.heading("control: random subsets of equal size, equal steps")
    arm, policy, lengths = _begin(do, "control", data, start), start, do.desk.config.train.stages
    for number, (selection, length) in enumerate(zip(selections, lengths, strict=True)):
        stage, before = Stage(number, selection, length), dict(do.seconds)
        policy = _train(do, arm, stage, data, policy, sum(lengths), "shuffle")
        stage.seconds = do.since(before)
    return arm


def _random(do: Do, data: str, start: str, rollouts: int) -> Arm:
    """Train on a plain shuffle of the pool for as many rollouts as the curriculum spent, selection included."""
    train = do.desk.config.train
    length = math.ceil(rollouts / (train.batch * train.rollouts))
    do.desk.reporter.heading(f"random: {length} steps on a shuffle, as many rollouts in all")
    arm = _begin(do, "random", data, start)
    size = len(do.desk.pool(data))
    before = dict(do.seconds)
    stage = Stage(0, do("shuffle", data, [], 0, budget=size, seed=do.desk.seed("shuffle", 0)), length)
    _train(do, arm, stage, data, start, length, "shuffle")
    stage.seconds = do.since(before)
    return arm
