"""A store in a temporary folder, and sample columns to put in it."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stores import disk, open_store
from stores.objects import File
from stores.remote import RemoteObjects
from stores.store import Store

Columns = dict[str, list[Any]]
OPERATIONS = ("create", "reopen", "append", "sync", "rename", "make_folder", "sync_folder", "unlink")


@pytest.fixture(params=["local", "shared"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str | None, str | None]:
    """Where a store is, as `open_store` takes it: SQLite and local files, or PostgreSQL and S3."""
    if request.param == "local":
        return tmp_path / "store", None, None
    return tmp_path / "store", request.getfixturevalue("postgres")(), request.getfixturevalue("bucket")()


@pytest.fixture
def store(place: tuple[Path, str | None, str | None]) -> Store:
    """An empty store, of each kind."""
    return open_store(*place)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    """An empty store on SQLite and local files."""
    return open_store(tmp_path / "store")


@pytest.fixture
def overwrite() -> Callable[[Store, File, bytes | None], None]:
    """Replaces the bytes of an object, wherever they are kept, behind the store's back; with None removes them."""
    return _overwrite


def _overwrite(store: Store, file: File, data: bytes | None) -> None:
    path = store.objects.place(file)
    path.unlink(missing_ok=True)
    if data is not None:
        path.write_bytes(data)
    if isinstance(store.objects, RemoteObjects):
        remote, there = store.objects._bucket, store.objects._remote(file.digest)
        if data is None:
            remote.rm_file(there)
        else:
            remote.pipe_file(there, data)


@pytest.fixture
def rollouts() -> Callable[..., Columns]:
    """Makes the columns of a shard: 4 prompts with `samples` rollouts each, the same for the same seed."""

    def make(seed: int = 0, samples: int = 3, length: int = 5) -> Columns:
        rng = np.random.default_rng(seed)
        rows = [(f"prompt-{prompt}", sample) for prompt in range(4) for sample in range(samples)]
        tokens = [rng.integers(0, 1000, rng.integers(0, length + 1)).tolist() for _ in rows]
        verdicts = rng.choice(["correct", "incorrect", "truncated"], len(rows)).tolist()
        return {
            "prompt_uid": [uid for uid, _ in rows],
            "sample": [sample for _, sample in rows],
            "policy": ["policy-0"] * len(rows),
            "step": [seed] * len(rows),
            "prompt_ids": [[1, 2, 3]] * len(rows),
            "completion_ids": tokens,
            "logp_old": [np.float32(-rng.random(len(row))).tolist() for row in tokens],
            "temperature": [1.0] * len(rows),
            "finish_reason": ["stop"] * len(rows),
            "seed": [2**40 + sample for _, sample in rows],
            "text": [f"the answer is {row} \u00e9\U0001f600" for row in tokens],
            "reward": [float(verdict == "correct") for verdict in verdicts],
            "verdict": verdicts,
        }

    return make


@pytest.fixture
def names() -> dict[str, str]:
    """The meta that names a generation of gradients."""
    return {"policy": "policy-0", "projection": "sparse-0", "objective": "grpo"}


@contextmanager
def failing_statement(store: Store, number: int, *, after: bool) -> Iterator[None]:
    """Let the n-th statement or commit of a catalog fail, before it is done or after, within a `with` block."""
    dialect, calls = store.catalog.database._engine.dialect, count(1)
    error = dialect.loaded_dbapi.OperationalError

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            bad = next(calls) == number
            if bad and not after:
                raise error("disk I/O error")
            result = operation(*args, **kwargs)
            if bad:
                raise error("connection lost")
            return result

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in ("do_execute", "do_executemany", "do_commit"):
            patch.setattr(dialect, name, wrap(getattr(dialect, name)))
        yield


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Lets the n-th of the eight disk operations fail as on a full disk, within a `with` block."""

    @contextmanager
    def failing(number: int) -> Iterator[None]:
        calls = count(1)

        def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any) -> Any:
                if next(calls) == number:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return operation(*args)

            return wrapped

        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(disk, name, wrap(getattr(disk, name)))
            yield

    return failing
