"""Metrics to the trackers that a run names in ``report_to``, while it goes on.

The door to ``accelerate``, whose trackers these are, to ``mlflow``, for where its files go, and to ``trackio``. A
tracker is a window: a run's numbers are recorded in its store and in ``metrics.jsonl``. So one whose library is missing
is refused before anything is computed, and one that fails later is left out with a warning.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import (
    GeneralTracker,
    MLflowTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
    get_available_trackers,
)

from flows.config import Config, ConfigError
from flows.desk import Desk
from flows.summary import rows

PROJECT = "influent"  # where the tracker's own environment names none
DEFAULTS = {  # of the environment: nothing is told of the use of a library, and a dead server holds a run for seconds
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}


class _TensorBoard(TensorBoardTracker):  # type: ignore[misc]
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the settings beside the curves, not in a run of their own."""
        self.writer.add_hparams(values, {}, run_name=".")


class _WandB(WandBTracker):  # type: ignore[misc]
    def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
        """Give each arm a count of steps of its own, since wandb's only goes up."""
        arm = next(iter(values)).split("/")[0]
        self.run.define_metric(f"{arm}/*", step_metric=f"{arm}/step")
        super().log({**values, f"{arm}/step": step}, **options)


class _Trackio(TrackioTracker):  # type: ignore[misc]
    def finish(self) -> None:
        """Finish for good: what trackio still holds open it would close on standard output, after the results."""
        import trackio

        trackio.finish()


def require(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ConfigError: a library is missing; the message says how to install it.
    """
    there = {str(name.value) for name in get_available_trackers()}
    missing = [name for name in dict.fromkeys(names) if name not in there]
    if missing:
        raise ConfigError(
            f"report_to names {', '.join(map(repr, missing))}, which is not installed: pip install "
            f"{' '.join(missing)}, or leave it out"
        )


@contextmanager
def reporting(desk: Desk) -> Iterator[None]:
    """Open the trackers of a run, one run of theirs a seed, and send them each checkpoint that ``desk.report`` gets."""
    trackers = Trackers(desk.config, desk.folder)

    def report(arm: str, stage: int, checkpoint: tuple[int, str, str]) -> None:
        for row in rows(desk, arm, stage, checkpoint):
            trackers.log(numbers(row), row["step"])

    try:
        if trackers.live:
            desk.report = report
        yield
    finally:
        trackers.finish()


class Trackers:
    """The trackers of one seed, each left out from its first failure on.

    Args:
        config: the resolved settings, which the trackers get too.
        folder: the run directory, where trackers that keep files keep them.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.live: dict[str, GeneralTracker] = {}
        if not config.report_to:
            return
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        PartialState(cpu=True)  # accelerate's log asks for it; it holds no device
        settings = flat(config.model_dump(mode="json", exclude_none=True))
        for name in dict.fromkeys(config.report_to):
            with self._outlive(name):
                tracker = OPENERS[name](f"{config.name}-seed{config.seed}", folder.absolute())
                tracker.start()
                tracker.store_init_configuration(settings)
                self.live[name] = tracker

    def log(self, values: dict[str, float], step: int) -> None:
        """Send numbers by name, at a step of their arm."""
        for name, tracker in list(self.live.items()):
            with self._outlive(name):
                tracker.log(values, step=step)

    def finish(self) -> None:
        """Close every tracker."""
        for name, tracker in list(self.live.items()):
            with self._outlive(name):
                tracker.finish()

    @contextmanager
    def _outlive(self, name: str) -> Iterator[None]:
        """Leave a tracker out from here on, with a warning, if it raises: whatever it raises must not end the run."""
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                yield
        except Exception as error:
            self.live.pop(name, None)
            said = re.sub(r"//[^/@\s]+@", "//", str(error))  # an address may hold a password
            warnings.warn(
                f"report_to: {name!r} failed and gets no more of this run, which goes on; metrics.jsonl will have "
                f"every number ({type(error).__name__}: {said})",
                stacklevel=3,
            )


def _tensorboard(run: str, folder: Path) -> GeneralTracker:
    """Return a tracker whose readers forget what an earlier start of this run has sent, and is sent again."""
    return _TensorBoard(run, folder / "tensorboard", purge_step=0)


def _wandb(run: str, folder: Path) -> GeneralTracker:
    project, place = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_DIR", str(folder))
    return _WandB(project, name=run, dir=place)


def _trackio(run: str, folder: Path) -> GeneralTracker:
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))  # read once, when trackio is imported
    return _Trackio(os.environ.get("TRACKIO_PROJECT", PROJECT), name=run)


def _mlflow(run: str, folder: Path) -> GeneralTracker:
    if "MLFLOW_TRACKING_URI" in os.environ:
        return MLflowTracker(PROJECT, run_name=run)
    import mlflow

    (folder / "mlflow").mkdir(exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    return MLflowTracker(PROJECT, run_name=run, logging_dir=(folder / "mlflow" / "artifacts").as_uri())


OPENERS: dict[str, Callable[[str, Path], GeneralTracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """Return what a row of the metrics says, by ``<arm>/train/<metric>`` or ``<arm>/eval/<set>/<metric>``."""
    if "evaluation" in row:
        return {
            f"{row['arm']}/eval/{split}/{metric}": float(value)
            for split, level in row["evaluation"].items()
            for metric, value in level.items()
        }
    told = {name: value for name, value in row.items() if name not in ("arm", "seed", "step")}
    return {f"{row['arm']}/train/{metric}": float(value) for metric, value in told.items()}


def flat(settings: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return settings by their dotted names; lists as JSON, since trackers compare single values."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{name}.")
        else:
            found[above + name] = json.dumps(value) if isinstance(value, list) else value
    return found
