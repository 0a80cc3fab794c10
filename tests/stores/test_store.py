"""One store: keys depend on all that matters, recorded files are found, and only garbage is collected."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import Conflict, Missing, open_store
from stores.objects import File
from stores.store import Store


def test_opening_imports_nothing_heavy() -> None:
    """`import stores` imports no SQLAlchemy, pyarrow, faiss or numpy."""
    code = "import sys, stores; print({'sqlalchemy', 'pyarrow', 'faiss', 'numpy', 'torch'} & sys.modules.keys())"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "set()"


def test_keys_depend_on_every_entry(store: Store) -> None:
    """A key begins with its step, is the same for the same identity, and another for any other."""
    key = store.key("score", method="cropi", budget=(1, 2), settings={"a": None})
    assert key.startswith("score-") and len(key) == len("score-") + 24
    assert key == store.key("score", settings={"a": None}, budget=[1, 2], method="cropi")
    others = [
        store.key("select", method="cropi", budget=(1, 2), settings={"a": None}),
        store.key("score", method="insight", budget=(1, 2), settings={"a": None}),
        store.key("score", method="cropi", budget=(2, 1), settings={"a": None}),
        store.key("score", method="cropi", budget=(1, 2), settings={"a": 0}),
        store.key("score", method="cropi", budget=(1, 2)),
    ]
    assert len({key, *others}) == 6


def test_a_key_is_the_same_forever(store: Store) -> None:
    """The key of an identity does not change between versions, unless the schema number does."""
    text = b'{"identity":{"pool":"p","seed":0},"schema":1,"step":"collect"}'
    assert store.key("collect", seed=0, pool="p") == f"collect-{hashlib.sha256(text).hexdigest()[:24]}"


def test_what_cannot_be_part_of_a_key_is_named(store: Store) -> None:
    """An identity without a JSON spelling, or a bad step name, is an error that names it."""
    with pytest.raises(ValueError, match=r"^settings\['rate'\] is nan"):
        store.key("score", settings={"rate": float("nan")})
    with pytest.raises(ValueError, match=r"step is '\.\./x'"):
        store.key("../x")


def test_recorded_files_are_found(store: Store, tmp_path: Path) -> None:
    """What is recorded, from bytes or from a file, is there with its meta, also for who opens the store later."""
    (tmp_path / "local").write_bytes(b"from a file")
    assert not store.done("key")
    assert store.record("key", "t", {"n": 1}, {"a": b"bytes", "b": tmp_path / "local"}) == "key"
    again = open_store(store.root)
    assert again.done("key") and again.meta("key") == {"n": 1}
    assert again.file("key", "t", "b").read_bytes() == b"from a file"


def test_what_is_absent_is_said_clearly(store: Store) -> None:
    """An absent key or file is Missing, a KeyError with a readable message; another kind is a ValueError."""
    with pytest.raises(KeyError) as error:
        store.get("absent")
    assert str(error.value).startswith("key 'absent' is not in the store at")
    store.record("key", "t", {})
    with pytest.raises(Missing, match="no file 'f'"):
        store.file("key", "t", "f")
    with pytest.raises(ValueError, match="names 't', not 'policy'"):
        store.file("key", "policy", "f")


def test_a_conflict_keeps_the_first(store: Store) -> None:
    """Other content under a key is refused, and what was there stays."""
    store.record("key", "t", {}, {"f": b"first"})
    with pytest.raises(Conflict, match="file 'f'"):
        store.record("key", "t", {}, {"f": b"second"})
    assert store.file("key", "t", "f").read_bytes() == b"first"


def test_verify_names_what_is_wrong(store: Store) -> None:
    """A full scan yields every referenced file, with an error for those that are damaged or gone."""
    store.record("a", "t", {}, {"x": b"1", "y": b"2"})
    store.record("b", "t", {}, {"x": b"3"})
    assert [(key, name, error) for key, name, _, error in store.verify()] == [
        ("a", "x", None),
        ("a", "y", None),
        ("b", "x", None),
    ]
    _overwrite(store.file("a", "t", "y"), b"9")
    store.file("b", "t", "x").unlink()
    errors = {(key, name): error for key, name, _, error in store.verify()}
    assert errors["a", "x"] is None
    assert "SHA-256" in str(errors["a", "y"])
    assert "is not in the store" in str(errors["b", "x"])


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_collector_takes_old_orphans_only(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is referenced or young stays; every old object without a reference goes, as every old temporary."""
    store = open_store(tmp_path_factory.mktemp("store"))
    now, old, young, kept = time.time(), set(), set(), set()
    for number in range(data.draw(st.integers(0, 8))):
        content = str(number).encode()
        if data.draw(st.booleans()):
            store.record(f"key-{number}", "t", {}, {"f": content})
            path, group = store.file(f"key-{number}", "t", "f"), kept
        elif data.draw(st.booleans()):
            path, group = store.objects.path(store.objects.put(content)), young
        else:
            path, group = store.objects.temporary(), young
            path.write_bytes(content)
        if data.draw(st.booleans()):
            os.utime(path, (now - 1000, now - 1000))
            group = old if group is young else kept
        group.add(path)
    assert set(store.orphans()) == {path for path in old | young if path.parent != store.objects.temporaries}
    assert store.collect(grace_seconds=500) == len(old)
    assert all(path.exists() for path in young | kept) and not any(path.exists() for path in old)
    assert store.collect(grace_seconds=0) == len(young)
    assert all(error is None for *_, error in store.verify())


def test_an_orphan_that_is_written_again_is_young(store: Store) -> None:
    """An old orphan that a step is about to reference is not collected."""
    path = store.objects.path(store.objects.put(b"x"))
    os.utime(path, (1, 1))
    store.objects.put(b"x")
    assert store.collect() == 0 and path.exists()


def test_an_object_collected_before_its_commit_comes_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection between the put and the commit does not lose a file."""
    commit = store.catalog.commit

    def collect_first(*args: Any) -> Any:
        assert store.collect(grace_seconds=0) == 1
        return commit(*args)

    monkeypatch.setattr(store.catalog, "commit", collect_first)
    store.record("key", "t", {}, {"f": b"x"})
    assert store.file("key", "t", "f").read_bytes() == b"x"


def test_a_reader_keeps_its_version(store: Store, names: dict[str, str]) -> None:
    """A mapped generation answers the same after its file is unlinked, and during commits and collections."""
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    store.gradients.write("generation", [str(row) for row in range(50)], rows, names)
    uids, norms, index = store.gradients._open("generation")
    before = index.index.reconstruct_n(0, 50)
    for number in range(10):
        store.record(f"key-{number}", "t", {}, {"f": str(number).encode()})
        store.collect(grace_seconds=0)
    store.objects.place(store.get("generation").files["index.faiss"]).unlink()
    np.testing.assert_array_equal(index.index.reconstruct_n(0, 50), before)
    assert len(uids) == len(norms) == 50


def test_opening_a_large_store_is_fast(tmp_path: Path) -> None:
    """A store with 2,000 artifacts opens in under a second: nothing is listed, nothing is repaired."""
    store = open_store(tmp_path)
    with store.catalog._transaction(write=True) as connection:
        rows = [(f"key-{number}", number, "t", "{}", "") for number in range(2000)]
        for row in rows:
            connection.exec_driver_sql("insert into artifacts values (?, ?, ?, ?, ?)", row)
    start = time.perf_counter()
    assert open_store(tmp_path).done("key-1999")
    assert time.perf_counter() - start < 1.0


def test_files_are_compared_by_content() -> None:
    """A File is its digest and size."""
    assert File("a", 1) == File("a", 1) != File("a", 2)


def _overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)
