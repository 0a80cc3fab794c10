"""Prefect servers on loopback: one that ends with a run, and one that stays beside a schedule. Quiet, closed, at home.

Telemetry is off, nothing listens but on 127.0.0.1, and all that a server keeps lies in a folder that is named to it.
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
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
}
"""What everything that we start finds in its environment."""
LASTING = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
"""A server forgets who holds a slot when it is killed, and then the slot is taken for ever, unless it is on disk."""
START_LIMIT = 240.0  # seconds until the server must answer: seconds on an idle laptop, much more on a busy one


def quieten(home: Path) -> None:
    """Switch telemetry off, and keep Prefect's files in ``home``, where the environment does not say otherwise."""
    home.mkdir(parents=True, exist_ok=True)
    for name, value in {**QUIET, "PREFECT_HOME": str(home.absolute())}.items():
        os.environ.setdefault(name, value)


@contextmanager
def server(home: Path, port: int = 0) -> Iterator[str]:
    """Run a server that ends with this process, however this process ends; gives the URL of its API.

    Args:
        home: its database, its leases and its log.
        port: of 127.0.0.1; 0 for any that is free.

    Raises:
        OSError: it does not start; the message says where its log is.
    """
    port = _free(port)
    spec = find_spec("prefect")
    assert spec is not None and spec.origin is not None
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(Path(spec.origin).parent.parent), "--factory"]
    command += ["prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"
    ours = QUIET | LASTING | {"PREFECT_HOME": str(home.absolute()), "PREFECT_UI_API_URL": url}
    others = ("PREFECT_API_URL", "PREFECT_API_DATABASE", "PREFECT_SERVER_DATABASE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(others)} | ours
    home.mkdir(parents=True, exist_ok=True)
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--log-level", "error"],
            env=environment | {"PREFECT_SERVER_LOGGING_LEVEL": "ERROR"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_die_with_parent,
            start_new_session=True,  # Ctrl-C is for the run, which then ends its server
        )
    try:
        _wait_until_healthy(f"{url}/health", process, home / "server.log")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _free(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(
                f"port = {port}: {error}; name another, or set PREFECT_API_URL to use the server that is there"
            ) from error
        return int(probe.getsockname()[1])


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    limit, direct = time.monotonic() + START_LIMIT, urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < limit and process.poll() is None:
        try:
            with direct.open(url, timeout=5):
                return
        except OSError:
            time.sleep(0.25)
    raise OSError(f"the Prefect server did not start, see {log}; 'influent run --no-prefect' runs without it")


def _die_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, also by SIGKILL; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
