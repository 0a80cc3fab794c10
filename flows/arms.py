"""What a run leaves behind as it goes, in keys and counts: its arms, and the stages of each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stores.errors import Missing

if TYPE_CHECKING:
    from flows.desk import Desk
    from stores.store import Store


@dataclass
class Stage:
    """What a stage left behind, in keys and counts."""

    number: int
    selection: str
    steps: int
    policy: str = ""  # that the stage was selected for
    control: str = ""  # random subset of the same size
    checkpoints: list[tuple[int, str, str]] = field(default_factory=list)  # (step, policy, evaluation)
    rollouts_train: int = 0
    rollouts_select: int = 0
    targets: dict[str, tuple[list[str], int]] = field(default_factory=dict)
    scores: str = ""
    full: str = ""  # the same from the gradients of all parameters
    way: str = ""
    cascade: dict[str, Any] = field(default_factory=dict)  # what the free filters saved
    rollouts_refresh: int = 0  # of those for selection, the ones that replace stale evidence
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Arm:
    """One trained run: the curriculum, or a control."""

    name: str
    start: str
    start_evaluation: str
    stages: list[Stage] = field(default_factory=list)
    evidence: list[str] = field(default_factory=list)
    collected: int = 0

    @property
    def rollouts(self) -> int:
        """Everything that was sampled for this arm, selection included, evaluation not."""
        return self.collected + sum(stage.rollouts_train + stage.rollouts_select for stage in self.stages)


def show(desk: Desk, stage: Stage) -> None:
    """Tell who watches that a stage is released, once; then it is on record."""
    facts = {"selection": stage.selection, "policy": stage.policy, "control": stage.control}
    key = desk.store.key("release", **facts)
    if not desk.store.done(key):
        desk.windows.released(desk, stage)
        desk.store.record(key, "release", facts)


def keep(desk: Desk, data: str, arm: Arm) -> bool:
    """Put what an arm left behind so far on record, and tell who watches; both once. Return whether it is new.

    What a clock said is left out, so that a repeated run keeps the same.
    """
    facts = asdict(replace(arm, stages=[replace(stage, seconds={}) for stage in arm.stages]))
    key = desk.store.key("arm", data=data, arm=facts, seed=desk.config.seed)
    told, new = desk.store.key("told", arm=key), not desk.store.done(key)
    if new:
        desk.store.record(key, "arm", {"data": data, "arm": facts, "seed": desk.config.seed})
    if not desk.store.done(told):
        desk.windows.finished(desk, arm)
        desk.store.record(told, "told", {"arm": key})
    return new


def kept(store: Store, seed: int | None = None) -> tuple[str, int, Arm]:
    """Return the prompts' key, the seed and the arm that was kept last, of one seed where it is given.

    Raises:
        Missing: there is none.
    """
    for key in reversed(store.catalog.keys("arm")):
        facts = store.meta(key)
        if seed in (None, facts["seed"]):
            stages = [
                Stage(**stage | {"checkpoints": [tuple(point) for point in stage["checkpoints"]]})
                for stage in facts["arm"]["stages"]
            ]
            return facts["data"], facts["seed"], Arm(**facts["arm"] | {"stages": stages})
    raise Missing(f"no stage is finished in {store.root}; 'influent run' or 'influent train' finishes one")
