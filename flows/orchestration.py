"""The loop as a Prefect flow: each step a task, so that a person can watch it. The door to ``prefect``.

Prefect schedules and shows; it never records. Tasks are not cached and keep no result, because the stores decide what
is done already. Telemetry is off, and its files stay in the run directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flows.config import Config
from flows.progress import Reporter

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # a failed step is told once, by the command line
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "240",  # its own 20 s are too few on a busy laptop
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
}


def run_as_flow(config: Config, folder: Path, reporter: Reporter, *, seeds: Sequence[int]) -> dict[str, Any]:
    """Run the loop as a Prefect flow: against the server of ``PREFECT_API_URL``, else a temporary one on loopback."""
    for name, value in {**QUIET, "PREFECT_HOME": str((folder / "prefect").absolute())}.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("PREFECT_API_URL"):
        reporter.line("starting a temporary Prefect server, about half a minute (--no-prefect runs without)")
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE

    from flows.run import run

    def wrap(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return step(*args, **kwargs)

        return task(name=name, cache_policy=NO_CACHE, persist_result=False)(call)

    @flow(name="curriculum", flow_run_name=config.name, persist_result=False, validate_parameters=False)
    def curriculum() -> dict[str, Any]:
        return run(config, folder, reporter, seeds=seeds, wrap=wrap)

    return curriculum()
