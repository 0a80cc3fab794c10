"""Faults: a write cut short is invisible, damage never passes for data, and nothing executes on load."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy.exc import SQLAlchemyError

from stores import Damaged, Missing, StoreError, open_store
from stores.collector import collect
from stores.leases import Leases
from stores.merge import merge
from stores.objects import File
from stores.store import Store
from stores.verification import verify
from tests.stores.conftest import failing_statement

ROOT = Path(__file__).parents[2]
DAMAGES = 200  # for each store
Read = Callable[[], Any]
Overwrite = Callable[[Store, File, bytes | None], None]


def _operations(
    store: Store, rollouts: Callable[..., Any], names: dict[str, str], tmp_path: Path
) -> dict[str, tuple[Read, Callable[[], bool]]]:
    """Every public operation that writes: what to call, and whether it is done."""
    policy, other = tmp_path / "policy", open_store(tmp_path / "other")
    (policy / "deep").mkdir(parents=True, exist_ok=True)
    (policy / "config.json").write_text("{}")
    (policy / "deep" / "weights").write_bytes(b"w" * 1000)
    rows = np.eye(3, 8, dtype=np.float32)
    selection = {"prompt_uid": ["a"], "stage": [0], "reason": ["selected"], "rank": [0]}
    other.record("merged", "t", {}, {"f": b"from elsewhere"}, [("p", 1, 1)])
    store.record("to-retire", "t", {}, {"f": b"retired"})
    store.gradients.write("old-gradients", ["a", "b", "c"], rows, names)
    store.checkpoints.write("old-policy", policy, {})
    lease = store.leases.acquire("held", 60.0)
    writes: dict[str, Read] = {
        "rollouts": lambda: store.trajectories.write_all("rollouts", [rollouts(1), rollouts(2)], {}),
        "gradients": lambda: store.gradients.write("gradients", ["a", "b", "c"], rows, names),
        "tombstone": lambda: store.gradients.drop("tombstone", ["old-gradients"], ["a"]),
        "compacted": lambda: store.gradients.compact("compacted", ["old-gradients"]),
        "table": lambda: store.tables.write("table", "scores", {"x": [1.0, None]}, {}),
        "selection": lambda: store.curricula.write("selection", selection, {}),
        "policy": lambda: store.checkpoints.write("policy", policy, {}),
        "counts": lambda: store.beliefs.apply("counts", [("a", 1, 2)], {}),
        "merged": lambda: merge(store, other),
    }
    operations = {key: (write, lambda key=key: store.done(key)) for key, write in writes.items()}
    folder = store.root / "checkpoints" / "old-policy" / "deep" / "weights"
    return operations | {
        "folder": (lambda: store.checkpoints.folder("old-policy"), folder.exists),
        "retire": (lambda: store.catalog.retire("to-retire"), lambda: not store.done("to-retire")),
        "lease": (lambda: store.leases.acquire("new", 0.05), lambda: _is_held(store.leases, "new")),
        "renew": (lambda: store.leases.renew(lease, 6000.0), lambda: store.leases._expiry("held") > lease.expires_at),
        "release": (lambda: store.leases.release(lease), lambda: not _is_held(store.leases, "held")),
        "collect": (
            lambda: (time.sleep(0.06), collect(store, 0)),
            lambda: not store.objects.exists(File(_sha(b"retired"), 7)),
        ),
    }


@pytest.mark.timeout(600)
def test_every_write_cut_short_is_invisible(
    store: Store,
    rollouts: Callable[..., Any],
    names: dict[str, str],
    tmp_path: Path,
    fail_at: Callable[[int], AbstractContextManager[None]],
) -> None:
    """Whichever disk operation of whichever call fails: nothing of it is seen, the old is read, a repeat works."""
    failures = _try_all(store, rollouts, names, tmp_path, fail_at)
    assert failures["rollouts"] >= 5 and failures["policy"] >= 10 and sum(failures.values()) >= 50


@pytest.mark.timeout(600)
@pytest.mark.parametrize("acknowledged", [False, True], ids=["before", "after"])
def test_every_failing_statement_is_survived(
    store: Store,
    rollouts: Callable[..., Any],
    names: dict[str, str],
    tmp_path: Path,
    acknowledged: bool,
) -> None:
    """Whichever statement or commit of the catalog fails, before it is done or after: all or nothing, a repeat works."""
    failing = partial(failing_statement, store, after=acknowledged)
    failures = _try_all(store, rollouts, names, tmp_path, failing)
    assert failures["rollouts"] >= 5 and failures["retire"] >= 2 and sum(failures.values()) >= 50


def _try_all(
    store: Store, rollouts: Any, names: dict[str, str], tmp_path: Path, failing: Callable[[int], Any]
) -> dict[str, int]:
    """Let the n-th step of each operation fail, for n = 1, 2, ... until it succeeds; counts the failures."""
    store.trajectories.write("old", rollouts(0), {})
    before = store.trajectories.read(["old"], ["text"])
    failures: dict[str, int] = {}
    for name, (operation, done) in _operations(store, rollouts, names, tmp_path).items():
        number, succeeded = 0, False
        while not succeeded:
            number += 1
            keys = store.catalog.keys()
            try:
                with failing(number):
                    operation()
                succeeded = True
            except (OSError, StoreError, SQLAlchemyError) as error:
                assert isinstance(error, OSError | StoreError), f"{name} raised {type(error)}"
                assert "repeat the step" in str(error) or "the step that" in str(error)
                assert store.trajectories.read(["old"], ["text"]) == before
                assert done() or store.catalog.keys() == keys
                if done():  # the answer was lost, not the work
                    break
        failures[name] = number - succeeded
        if name not in ("lease", "retire"):
            operation()  # repeating what is done is no error
        assert done()
        assert [verdict.wrong for verdict in verify(store) if verdict.wrong] == []
    return failures


FULL = """
import resource, signal, sys
from pathlib import Path
from stores import StoreError, open_store
store, limit = open_store(Path(sys.argv[1])), int(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    store.record(f"key-{limit}", "t", {}, {"f": b"x" * 60_000}, [(f"p{n}", 1, n) for n in range(2000)])
except (OSError, StoreError) as error:
    print(f"failed: {error}")
"""


def test_a_full_disk_leaves_the_last_version(tmp_path: Path) -> None:
    """Where files cannot grow beyond n bytes, for n from nothing to enough: old or new, whole, in files and catalog."""
    open_store(tmp_path / "store").record("old", "t", {}, {"f": b"old"}, [("p", 1, 1)])
    outcomes = []
    for limit in (0, 8192, 59_999, 60_000, 100_000, 200_000, 400_000, 10_000_000):
        command = [sys.executable, "-c", FULL, str(tmp_path / "store"), str(limit)]
        printed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
        store = open_store(tmp_path / "store")
        outcomes.append(printed)
        assert store.done(f"key-{limit}") == (not printed)
        assert store.file("old", "t", "f").read_bytes() == b"old"
        assert store.beliefs.totals(["old"]) == {"p": (1, 1)}
        assert [verdict.wrong for verdict in verify(store) if verdict.wrong] == []
    assert "while writing" in outcomes[1] and any("catalog" in text for text in outcomes) and not outcomes[-1]


@pytest.fixture
def kept(store: Store, rollouts: Callable[..., Any], names: dict[str, str]) -> dict[str, tuple[str, str, Read]]:
    """One thing of each kind in a store: its key, its file, and how it is read."""
    rows = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    uids = [f"prompt-{row}" for row in range(20)]
    selection = {"prompt_uid": uids, "stage": [0] * 20, "reason": ["selected"] * 20, "rank": list(range(20))}
    store.trajectories.write("trajectories", rollouts(0), {})
    store.gradients.write("gradients", uids, rows, names)
    store.tables.write("table", "scores", {"uid": uids, "score": rows[:, 0]}, {})
    store.curricula.write("selection", selection, {})
    return {
        "trajectories": ("trajectories", "rollouts.parquet", lambda: store.trajectories.read(["trajectories"])),
        "gradients-index": ("gradients", "index.faiss", lambda: store.gradients.search("gradients", rows[:2])),
        "gradients-rows": ("gradients", "rows.parquet", lambda: store.gradients.read("gradients")),
        "table": ("table", "table.parquet", lambda: store.tables.read("table")),
        "selection": ("selection", "selection.parquet", lambda: store.curricula.read("selection")),
    }


@pytest.mark.parametrize("kind", ["trajectories", "gradients-index", "gradients-rows", "table", "selection"])
def test_damage_never_passes_for_data(
    store: Store, kept: dict[str, tuple[str, str, Read]], overwrite: Overwrite, torture: int, kind: str
) -> None:
    """Any flipped bit, cut, appended bytes or other object's bytes is Damaged, and the message names file and store."""
    key, name, read = kept[kind]
    read()
    file = store.get(key).files[name]
    whole, rng = store.objects.read(file), random.Random(kind)
    others = [store.objects.read(f) for _, _, f in store.catalog.files() if f != file]
    for _ in range(DAMAGES * torture):
        overwrite(store, file, _damaged(whole, others, rng))
        with pytest.raises(Damaged, match="of the store at") as error:
            read()
        assert file.digest in str(error.value) and key in str(error.value) and str(store.root) in str(error.value)
    overwrite(store, file, None)
    with pytest.raises(Missing, match="in the store"):
        read()
    overwrite(store, file, whole)
    read()


def test_a_damaged_catalog_never_passes_for_data(tmp_path: Path, rollouts: Callable[..., Any], torture: int) -> None:
    """Beliefs and entries out of a damaged SQLite file are those that were committed, or a typed error that names it."""
    store = open_store(tmp_path / "store")
    keys = [store.trajectories.write(f"batch-{seed}", rollouts(seed), {"seed": seed}) for seed in range(30)]
    keys += [store.beliefs.apply(f"counts-{n}", [(f"p{i}", i, n) for i in range(40)], {}) for n in range(10)]

    def read(again: Store) -> tuple[Any, ...]:
        entries = [again.get(key) for key in keys]
        return again.catalog.keys(), entries, again.beliefs.history(keys), again.catalog.files()

    expected, path = read(store), tmp_path / "store" / "catalog.sqlite"
    whole, rng, errors, passed = path.read_bytes(), random.Random(1), 0, 0
    for _ in range(DAMAGES * torture):
        path.write_bytes(_damaged(whole, [], rng))
        try:
            found = read(open_store(tmp_path / "store"))
        except StoreError as error:
            assert str(tmp_path / "store") in str(error)
            errors += 1
            continue
        assert found[:3] == expected[:3], "damage passed for data"
        assert found[3] == expected[3], "damage passed for data"
        passed += 1  # it hit nothing that is read, such as free space in a page
    assert errors > 40 and errors + passed == DAMAGES * torture
    path.write_bytes(whole)
    assert read(open_store(tmp_path / "store")) == expected


def test_swapped_files_are_damaged(store: Store, overwrite: Overwrite) -> None:
    """Two objects that change places are both refused."""
    store.record("key", "t", {}, {"a": b"one", "b": b"two"})
    files = store.get("key").files
    overwrite(store, files["a"], b"two")
    overwrite(store, files["b"], b"one")
    for name in "ab":
        with pytest.raises(Damaged):
            store.file("key", "t", name)


def _damaged(whole: bytes, others: list[bytes], rng: random.Random) -> bytes:
    kinds = ["flip", "flip", "cut", "extend", *(["swap"] if others else [])]
    kind, place = rng.choice(kinds), rng.randrange(len(whole))
    if kind == "swap":
        return rng.choice(others)
    if kind == "cut":
        return whole[:place]
    if kind == "extend":
        return whole + rng.randbytes(1 + place % 9)
    return whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]


def _is_held(leases: Leases, name: str) -> bool:
    return leases._expiry(name) > 0


def _sha(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
