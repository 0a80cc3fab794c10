"""The steps of a run by name, each timed, and wrapped by whoever watches the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from flows import collecting, full, gradients, prepare, release, steps
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
    "release": release.release,
    "train": steps.train,
    "evaluate": steps.evaluate,
}


_TOGETHER = {
    **{name: {name} for name in STEPS},
    "train": {"train", "evaluate"},  # a stage is trained and evaluated by turns
    "evaluate": {"train", "evaluate"},
}

Wrap = Callable[[str, Callable[..., Any]], Callable[..., Any]]


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
        wrap: Wrap,
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


@contextmanager
def doing(desk: Desk, wrap: Wrap, until: tuple[str, int] | None = None) -> Iterator[Do]:
    """Give the steps of a desk, in a process of their own where one of them has a time limit."""
    if not desk.config.timeouts:
        yield Do(desk, wrap, until)
        return
    from flows.isolation import Isolated

    isolated = Isolated(desk)
    try:
        yield Do(desk, lambda name, step: wrap(name, isolated.wrap(name, step)), until)
    finally:
        isolated.close()
