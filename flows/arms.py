"""What a run leaves behind as it goes, in keys and counts: its arms, and the stages of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stage:
    """What a stage left behind, in keys and counts."""

    number: int
    selection: str
    steps: int
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
