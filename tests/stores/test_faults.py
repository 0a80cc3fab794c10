"""Faults: a write cut short is invisible, and damage never passes for data, for every kind that is kept."""

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stores import Damaged
from stores.store import Store

Read = Callable[[], Any]


def _writers(store: Store, rollouts: Callable[..., Any], names: dict[str, str], tmp_path: Path) -> dict[str, Read]:
    """A write of each kind, by the key it commits."""
    (tmp_path / "policy" / "deep").mkdir(parents=True, exist_ok=True)
    (tmp_path / "policy" / "config.json").write_text("{}")
    (tmp_path / "policy" / "deep" / "weights").write_bytes(b"w" * 1000)
    rows = np.eye(3, 8, dtype=np.float32)
    selection = {"prompt_uid": ["a"], "stage": [0], "reason": ["selected"], "rank": [0]}
    return {
        "new-trajectories": lambda: store.trajectories.write("new-trajectories", rollouts(1), {}),
        "new-gradients": lambda: store.gradients.write("new-gradients", ["a", "b", "c"], rows, names),
        "new-table": lambda: store.tables.write("new-table", "scores", {"x": [1.0, None]}, {}),
        "new-selection": lambda: store.curricula.write("new-selection", selection, {}),
        "new-policy": lambda: store.checkpoints.write("new-policy", tmp_path / "policy", {}),
    }


def test_every_write_cut_short_is_invisible(
    store: Store,
    rollouts: Callable[..., Any],
    names: dict[str, str],
    tmp_path: Path,
    fail_at: Callable[[int], AbstractContextManager[None]],
) -> None:
    """Whichever disk operation of whichever write fails: the new key is absent, the old is read, a repeat works."""
    store.trajectories.write("old", rollouts(0), {})
    before = store.trajectories.read(["old"], ["text"])
    for key, write in _writers(store, rollouts, names, tmp_path).items():
        failures = 0
        while not store.done(key):
            store.collect(grace_seconds=0)
            try:
                with fail_at(failures + 1):
                    write()
            except OSError as error:
                assert "repeat the step" in str(error)
                assert not store.done(key)
                assert store.trajectories.read(["old"], ["text"]) == before
                failures += 1
        assert failures >= 5
        assert store.get(write()).key == key
        assert all(error is None for *_, error in store.verify())


@pytest.mark.parametrize("kind", ["trajectories", "gradients-index", "gradients-rows", "table"])
def test_damage_never_passes_for_data(
    store: Store, rollouts: Callable[..., Any], names: dict[str, str], kind: str
) -> None:
    """Any flipped bit, cut or appended byte, 60 of them a file, is Damaged, and the message names file and store."""
    rows = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    uids = [f"prompt-{row}" for row in range(20)]
    store.trajectories.write("trajectories", rollouts(0), {})
    store.gradients.write("gradients", uids, rows, names)
    store.tables.write("table", "scores", {"uid": uids, "score": rows[:, 0]}, {})
    reads: dict[str, tuple[str, str, Read]] = {
        "trajectories": ("trajectories", "rollouts.parquet", lambda: store.trajectories.read(["trajectories"])),
        "gradients-index": ("gradients", "index.faiss", lambda: store.gradients.search("gradients", rows[:2])),
        "gradients-rows": ("gradients", "rows.parquet", lambda: store.gradients.read("gradients")),
        "table": ("table", "table.parquet", lambda: store.tables.read("table")),
    }
    key, name, read = reads[kind]
    read()
    path = store.objects.path(store.get(key).files[name])
    whole, rng = path.read_bytes(), random.Random(kind)
    for _ in range(60):
        _overwrite(path, _damaged(whole, rng))
        with pytest.raises(Damaged, match="of the store at") as error:
            read()
        assert str(path) in str(error.value) and key in str(error.value)
    _overwrite(path, whole)
    read()


def test_swapped_files_are_damaged(store: Store) -> None:
    """Two objects that change places are both refused."""
    store.record("key", "t", {}, {"a": b"one", "b": b"two"})
    a, b = (store.file("key", "t", name) for name in "ab")
    first, second = a.read_bytes(), b.read_bytes()
    _overwrite(a, second), _overwrite(b, first)
    for name in "ab":
        with pytest.raises(Damaged):
            store.file("key", "t", name)


def _overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def _damaged(whole: bytes, rng: random.Random) -> bytes:
    kind, place = rng.choice(["flip", "flip", "cut", "extend"]), rng.randrange(len(whole))
    if kind == "cut":
        return whole[:place]
    if kind == "extend":
        return whole + rng.randbytes(1 + place % 9)
    return whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
