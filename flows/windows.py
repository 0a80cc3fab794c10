"""What others see of a run while it goes on, and what they decide. Without Prefect: the log, and a file that waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.arms import Arm, Stage
    from flows.config import Config
    from flows.desk import Desk


class Windows:
    """Nobody watches; decisions come from the command line."""

    def wait(self, desk: Desk, selection: str) -> None:
        """Return when somebody has decided on a selection, whose stage waits for approval."""
        from flows.release import wait_here

        wait_here(desk, selection)

    def released(self, desk: Desk, stage: Stage) -> None:
        """See a stage that may be trained on from now on."""

    def finished(self, desk: Desk, arm: Arm) -> None:
        """See an arm whose last stage is finished, and on record."""

    def ended(self, config: Config, result: dict[str, Any]) -> None:
        """See what a whole run came to."""
