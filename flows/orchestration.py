"""The loop as a Prefect flow: each step a task, so that a person can watch it. The door to ``prefect``.

Prefect schedules and shows; it never records. Tasks are not cached and keep no result, because the stores decide what
is done already. Telemetry is off, the server listens on loopback alone, and its files stay in the run directory.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
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
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
}
START_LIMIT = 240.0  # seconds until the server must answer: half a minute on an idle laptop, much more on a busy one


def run_as_flow(config: Config, folder: Path, reporter: Reporter, *, seeds: Sequence[int]) -> dict[str, Any]:
    """Run the loop as a Prefect flow: against the server of ``PREFECT_API_URL``, else a temporary one on loopback."""
    home = folder.absolute() / "prefect"
    home.mkdir(parents=True, exist_ok=True)
    for name, value in {**QUIET, "PREFECT_HOME": str(home)}.items():
        os.environ.setdefault(name, value)
    if os.environ.get("PREFECT_API_URL"):
        return _flow(config, folder, reporter, seeds)
    reporter.line("starting a temporary Prefect server, about half a minute (--no-prefect runs without)")
    with _temporary_server(home) as url:
        os.environ["PREFECT_API_URL"] = url
        try:
            return _flow(config, folder, reporter, seeds)
        finally:
            del os.environ["PREFECT_API_URL"]


def _flow(config: Config, folder: Path, reporter: Reporter, seeds: Sequence[int]) -> dict[str, Any]:
    from prefect import flow, task
    from prefect.cache_policies import NO_CACHE

    from flows import cluster
    from flows.run import run

    def wrap(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        spread = cluster.spread(config, name, step)

        def call(*args: Any, **kwargs: Any) -> Any:
            return spread(*args, **kwargs)

        return task(name=name, cache_policy=NO_CACHE, persist_result=False)(call)

    options: Any = {"persist_result": False, "validate_parameters": False, "task_runner": cluster.runner(config)}

    @flow(name="curriculum", flow_run_name=config.name, **options)
    def curriculum() -> dict[str, Any]:
        return run(config, folder, reporter, seeds=seeds, wrap=wrap)

    return curriculum()


@contextmanager
def _temporary_server(home: Path) -> Iterator[str]:
    """Start a server that ends with this process, however this process ends; its output goes to a file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spec = find_spec("prefect")
    assert spec is not None and spec.origin is not None
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(spec.origin).parent.parent), "--factory"]
    command += ["prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("ab") as log:
        server = subprocess.Popen(
            [*command, "--log-level", "error"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/api/health", server, home / "server.log")
        yield f"http://127.0.0.1:{port}/api"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + START_LIMIT
    while time.monotonic() < limit and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.25)
    raise OSError(f"the temporary Prefect server did not start, see {log}; --no-prefect runs without it")


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, also by SIGKILL; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
