"""The loop as a Prefect flow: each step a task, so that a person can watch it.

Prefect schedules and shows; it never records. Tasks are not cached and keep no result, because the stores decide what
is done already. A task is tried again only after what may pass by itself: an outage, a time limit, a lost process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flows.config import Config
from flows.do import Wrap
from flows.progress import Reporter
from flows.server import quieten, server

GPU = "gpu"
"""The global concurrency limit that is held while a step computes on an accelerator."""
COMPUTES = frozenset(
    {"collect", "refresh", "featurize", "score_directional", "score_full", "train", "evaluate", "start_policy"}
)
WAITS = (10.0, 60.0, 300.0)  # seconds before each new try of a step
SILENT = {"PREFECT_LOGGING_LEVEL": "CRITICAL", "PREFECT_LOGGING_TO_API_ENABLED": "false"}
"""On the command line a failed step is told once, by the command line."""


def run_as_flow(config: Config, folder: Path, reporter: Reporter, *, seeds: Sequence[int]) -> dict[str, Any]:
    """Run the loop as a Prefect flow: against the server of ``PREFECT_API_URL``, else a temporary one on loopback."""
    home = folder.absolute() / "prefect"
    quieten(home)
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    if os.environ.get("PREFECT_API_URL"):
        return _flow(config, folder, reporter, seeds)
    reporter.line("starting a temporary Prefect server (--no-prefect runs without)")
    with server(home) as url:
        os.environ["PREFECT_API_URL"] = url
        try:
            return _flow(config, folder, reporter, seeds)
        finally:
            del os.environ["PREFECT_API_URL"]


def _flow(config: Config, folder: Path, reporter: Reporter, seeds: Sequence[int]) -> dict[str, Any]:
    from prefect import flow

    from flows.pages import Pages, with_progress
    from flows.run import run

    @flow(name="curriculum", flow_run_name=lambda: config.name, persist_result=False, validate_parameters=False)
    def curriculum() -> dict[str, Any]:
        shown = with_progress(reporter)
        return run(config, folder, shown, seeds=seeds, wrap=tasks(config), windows=Pages(folder, seeds[0]))

    return curriculum()


def tasks(config: Config) -> Wrap:
    """Return what makes a Prefect task of each step."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.concurrency.sync import concurrency

    from flows.cluster import spread

    trying: dict[str, Any] = {
        "cache_policy": NO_CACHE,
        "persist_result": False,
        "retries": len(WAITS),
        "retry_delay_seconds": list(WAITS),
        "retry_jitter_factor": 0.3,
        "retry_condition_fn": _may_pass,
    }

    def wrap(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        if name == "release":  # a flow can be suspended, a task cannot
            return step
        placed = spread(config, name, step, trying)
        limited = name in COMPUTES and config.policy.device != "cpu" and placed is step  # a cluster counts its own

        def call(*args: Any, **kwargs: Any) -> Any:
            with concurrency(GPU) if limited else nullcontext():
                return placed(*args, **kwargs)

        return task(name=name, **trying)(call)

    return wrap


def _may_pass(task: Any, run: Any, state: Any) -> bool:
    """Return whether a step failed of what may pass by itself."""
    from flows.isolation import Lost, Overdue
    from pipeline.generation.server import Unreachable as NoServer
    from stores.errors import Unreachable as NoStore

    try:
        state.result()
    except (Lost, Overdue, NoServer, NoStore):
        return True
    except Exception:
        return False
    return False
