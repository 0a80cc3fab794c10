"""The loop: evidence, then for each stage select, train, evaluate; beside it the controls.

Nothing here computes: it orders steps and hands keys on. ``do`` is the set of steps, plain or wrapped as Prefect tasks.
"""

from __future__ import annotations

from flows import controls, evidence, gradients, story
from flows.arms import Arm, Stage, keep, show
from flows.do import Do, Reached
from flows.training import begin, train


def run_seed(do: Do) -> tuple[str, list[Arm]]:
    """Run the curriculum and its controls for one seed; returns the prompts' key and the arms."""
    desk = do.desk
    desk.reporter.heading(f"prepare, seed {desk.config.seed}")
    start = do("start_policy")
    data = do("prompts", start)
    story.tell_prompts(desk, data)
    curriculum = run_curriculum(do, data, start)
    if do.found:  # the controls' steps are not those of a stage
        raise Reached(do.found)
    arms = [curriculum]
    if desk.config.controls:
        arms.append(controls.control(do, data, start, [stage.control for stage in curriculum.stages]))
        arms.append(controls.random(do, data, start, curriculum.rollouts))
    return data, arms


def run_curriculum(do: Do, data: str, start: str) -> Arm:
    """Run the stages of the curriculum alone."""
    desk, config = do.desk, do.desk.config
    arm = begin(do, "curriculum", data, start)
    do.stage = 0
    gather(do, arm, data, config.evidence.source)
    policy = start
    for number, length in enumerate(config.train.stages):
        do.stage = number
        desk.reporter.heading(f"stage {number} of {len(config.train.stages)}, curriculum")
        before = dict(do.seconds)
        if arm.evidence:
            stage = select(do, arm, data, policy, number, length)
        else:
            desk.reporter.line("  no stored rollouts yet: this stage trains on a shuffle, and is the collection")
            budget = min(length * config.train.batch, len(desk.pool(data)))
            shuffled = do("shuffle", data, [], number, budget=budget, seed=desk.seed("shuffle", number))
            stage = Stage(number, shuffled, length, policy)
        publish(do, data, stage)
        if config.diem.strength > 0 and config.diem.reference != "validation":
            stage.way = gradients.way(desk, policy)
        sampler = config.train.sampler if stage.scores else "shuffle"
        policy = train(do, arm, stage, data, policy, sum(config.train.stages), sampler)
        stage.seconds = do.since(before)
        keep(desk, data, arm)
    return arm


def gather(do: Do, arm: Arm, data: str, source: str) -> None:
    """Bring in the rollouts that the first selection rests on; none where the first stage is the collection."""
    desk = do.desk
    if source == "collect":
        rollouts, seed = desk.config.evidence.rollouts, desk.seed("collect")
        arm.evidence = do("collect", arm.start, data, "pool", rollouts=rollouts, seed=seed)
        arm.collected = story.count_rollouts(desk, arm.evidence)
    elif source == "import":
        arm.evidence = do("import_rollouts", data)
    elif source == "rescore":
        arm.evidence = do("rescore", data)


def publish(do: Do, data: str, stage: Stage) -> None:
    """Show a stage, draw its control, and release it, once a person has approved where the settings ask for that."""
    story.tell_selection(do.desk, data, stage)
    stage.control = controls.selection(do, data, stage)
    if stage.scores:
        do("release", stage.selection)
    show(do.desk, stage)


def select(do: Do, arm: Arm, data: str, policy: str, number: int, length: int = 0) -> Stage:
    """Select a stage for a policy, from the evidence of an arm; ``length`` is the steps it will be trained for."""
    desk, config = do.desk, do.desk.config
    stage, seed, fresh = Stage(number, "", length, policy), desk.seed("validation", number), {}
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
