"""Power loss: after any operation, whatever was not synced is gone, or there, or half there, and the store is whole.

Every file operation of a series of commits is recorded, with the catalog as each of its commits left it (SQLite keeps
its own promise: a transaction with full synchronisation survives). Then each prefix is replayed onto a model of a disk
that forgets, and what is left is opened as a store.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stores import disk, open_store
from stores.database import Database
from stores.spool import Spool
from stores.store import Store
from stores.verification import verify
from tests.stores.conftest import OPERATIONS

Operation = tuple[Any, ...]


@dataclass
class Inode:
    """A file's content, and how much of it is safe; or a folder."""

    folder: bool = False
    content: bytearray = field(default_factory=bytearray)
    synced: int = 0


class ForgetfulDisk:
    """A model of a disk: names and contents as programs see them, and as they are safe from power loss."""

    def __init__(self) -> None:
        self.names: dict[Path, Inode] = {}
        self.safe: dict[Path, Inode] = {}
        self.open: dict[int, Inode] = {}
        self.catalog: bytes | None = None

    def apply(self, operation: Operation) -> None:
        """Do one recorded operation."""
        kind, *rest = operation
        if kind == "create":
            self.names[rest[0]] = self.open[rest[1]] = Inode()
        elif kind == "reopen":
            self.open[rest[1]] = self.names[rest[0]]
        elif kind == "append":
            self.open[rest[0]].content += rest[1]
        elif kind == "sync":
            self.open[rest[0]].synced = len(self.open[rest[0]].content)
        elif kind == "rename":
            self.names[rest[1]] = self.names.pop(rest[0])
        elif kind == "make_folder":
            self.names.setdefault(rest[0], Inode(folder=True))
        elif kind == "unlink":
            del self.names[rest[0]]
        elif kind == "sync_folder":
            inside = {path for path in {*self.names, *self.safe} if path.parent == rest[0]}
            self.safe = {path: inode for path, inode in self.safe.items() if path not in inside}
            self.safe |= {path: self.names[path] for path in inside if path in self.names}
        elif kind == "catalog":
            self.catalog = rest[0]

    def after_power_loss(self, root: Path, rng: random.Random | None, keep: bool) -> None:
        """Write what is left below an existing folder: without `rng` all that was not synced is lost, or kept."""
        for path in sorted({*self.names, *self.safe}):
            there = self.names if (keep if rng is None else rng.random() < 0.5) else self.safe
            if path not in there or not (root / path).parent.is_dir():
                continue
            inode = there[path]
            if inode.folder:
                (root / path).mkdir()
                continue
            size = len(inode.content) if keep else inode.synced
            size = size if rng is None else rng.randint(inode.synced, len(inode.content))
            hole = rng.randint(inode.synced, size) if rng else size  # from here on, blocks that were never written
            (root / path).write_bytes(bytes(inode.content[:hole]) + b"\0" * (size - hole))
        if self.catalog is not None:
            (root / "store" / "catalog.sqlite").write_bytes(self.catalog)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Records, within a `with` block, what is done to the disk below a folder."""

    @contextmanager
    def recording(root: Path) -> Iterator[list[Operation]]:
        done: list[Operation] = []
        transaction = Database.transaction

        def relative(value: Any) -> Any:
            return value.relative_to(root) if isinstance(value, Path) else value

        def wrap(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any) -> Any:
                result = operation(*args)
                opened = name in ("create", "reopen")
                facts = (relative(args[0]), result) if opened else tuple(map(relative, args))
                done.append((name, *(bytes(fact) if isinstance(fact, memoryview) else fact for fact in facts)))
                return result

            return wrapped

        @contextmanager
        def committed(self: Database, write: bool = False) -> Iterator[Any]:
            with transaction(self, write) as connection:
                yield connection
            if write:
                assert not (root / "store" / "catalog.sqlite-wal").exists()
                done.append(("catalog", (root / "store" / "catalog.sqlite").read_bytes()))

        with monkeypatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(disk, name, wrap(name, getattr(disk, name)))
            patch.setattr(Database, "transaction", committed)
            yield done

    return recording


def _write_everything(store: Store, rollouts: Callable[..., Any], names: dict[str, str], folder: Path) -> list[str]:
    """Commit one thing of each kind; returns the keys in their order."""
    rows = np.eye(3, 8, dtype=np.float32)
    selection = {"prompt_uid": ["a"], "stage": [0], "reason": ["selected"], "rank": [0]}
    return [
        store.trajectories.write_all("rollouts", [rollouts(0), rollouts(1)], {}),
        store.gradients.write("gradients", ["a", "b", "c"], rows, names),
        store.beliefs.apply("counts", [("a", 1, 2)], {}),
        store.curricula.write("selection", selection, {}),
        store.checkpoints.write("policy", folder, {}),
        store.record("again", "t", {}, {"same": b"w" * 100_000}),
    ]


def test_any_moment_leaves_the_old_state_or_the_new(
    tmp_path: Path, record: Callable[..., Any], rollouts: Callable[..., Any], names: dict[str, str], torture: int
) -> None:
    """At every prefix of operations, under every way to lose what was not synced, exactly what was committed is there."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "weights").write_bytes(b"w" * 100_000)
    with record(tmp_path) as operations:
        store = open_store(tmp_path / "store")
        keys = _write_everything(store, rollouts, names, tmp_path / "policy")
    assert {name for name, *_ in operations} >= {"create", "append", "sync", "rename", "sync_folder", "catalog"}
    model, commits, rng = ForgetfulDisk(), -1, random.Random(0)
    for number, operation in enumerate(operations):
        model.apply(operation)
        commits += operation[0] == "catalog"  # the first made the tables
        ways = [(None, False), (None, True)] + [(rng, True)] * torture
        for way, (chance, keep) in enumerate(ways):
            root = tmp_path / f"{number}-{way}"
            root.mkdir()
            model.after_power_loss(root, chance, keep)
            left = open_store(root / "store")
            assert left.catalog.keys() == keys[: max(0, commits)]
            assert [verdict.wrong for verdict in verify(left) if verdict.wrong] == []
            if way == 0:
                assert _write_everything(left, rollouts, names, tmp_path / "policy") == keys
                assert [verdict.wrong for verdict in verify(left) if verdict.wrong] == []
    assert commits == len(keys)


def test_groups_that_wait_survive(tmp_path: Path, record: Callable[..., Any]) -> None:
    """At every prefix of operations, however unsynced writes are lost, the groups that were added are there, whole."""
    store = open_store(tmp_path / "store")
    with record(tmp_path) as operations:
        for number in range(3):
            store.spool.add("shard", f"group-{number}", {"text": [f"answer {number}"] * 50})
            operations.append(("added",))
    model, added, rng = ForgetfulDisk(), 0, random.Random(0)
    model.names[Path("store")] = model.safe[Path("store")] = Inode(folder=True)
    for number, operation in enumerate(operations):
        model.apply(operation)
        added += operation[0] == "added"
        for way, (chance, keep) in enumerate([(None, False), (None, True), (rng, True), (rng, True)]):
            root = tmp_path / f"{number}-{way}"
            root.mkdir()
            model.after_power_loss(root, chance, keep)
            found = Spool(root / "store").read("shard")
            assert list(found) in ([f"group-{n}" for n in range(added)], [f"group-{n}" for n in range(added + 1)])
            assert all(columns == {"text": [f"answer {name[-1]}"] * 50} for name, columns in found.items())
    assert added == 3


def test_the_model_forgets(tmp_path: Path) -> None:
    """The model itself: a file that was not synced, or whose name was not, is lost; one that was both is there."""
    name, other = Path("store/a"), Path("store/b")
    model = ForgetfulDisk()
    for operation in [
        ("make_folder", Path("store")),
        ("sync_folder", Path(".")),
        ("create", name, 1),
        ("append", 1, b"safe"),
        ("sync", 1),
        ("append", 1, b" lost"),
        ("sync_folder", Path("store")),
        ("create", other, 2),
    ]:
        model.apply(operation)
    for keep, expected in ((False, {"a": b"safe"}), (True, {"a": b"safe lost", "b": b""})):
        root = tmp_path / str(keep)
        root.mkdir()
        model.after_power_loss(root, None, keep)
        assert {path.name: path.read_bytes() for path in (root / "store").iterdir()} == expected


def test_a_store_that_does_not_sync_is_caught(
    tmp_path: Path, record: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replay finds a file that is committed before it is synced: without syncs, a committed file is lost."""
    with record(tmp_path) as operations:
        store = open_store(tmp_path / "store")
        monkeypatch.setattr(os, "fsync", lambda _: None)
        store.record("key", "t", {}, {"f": b"x" * 1000})
    model = ForgetfulDisk()
    for operation in operations:
        if operation[0] not in ("sync",):
            model.apply(operation)
    (tmp_path / "left").mkdir()
    model.after_power_loss(tmp_path / "left", None, False)
    assert [verdict.wrong for verdict in verify(open_store(tmp_path / "left" / "store")) if verdict.wrong]
