"""One store: keys depend on all that matters, and recorded files are found, with what they were made from."""

import copy
import hashlib
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from stores import Conflict, Missing, open_store
from stores.collector import collect
from stores.entries import Key
from stores.merge import merge
from stores.objects import File
from stores.store import Store
from stores.verification import verify


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


def test_recorded_files_are_found(store: Store, tmp_path: Path, place: tuple[Any, ...]) -> None:
    """What is recorded, from bytes or from a file, is there with its meta, also for who opens the store later."""
    (tmp_path / "local").write_bytes(b"from a file")
    assert not store.done("key")
    assert store.record("key", "t", {"n": 1}, {"a": b"bytes", "b": tmp_path / "local"}) == "key"
    again = open_store(*place)
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


def test_what_is_recorded_knows_where_it_came_from(store: Store) -> None:
    """Identity, inputs, code and settings are kept with an artifact, and do not matter when it is recorded again."""
    parent = store.key("rollouts", seed=0)
    store.record(parent, "t", {})
    key = store.key("score", rollouts=[parent], method="cropi")
    store.origin = {"code": "1+abc", "settings": "settings-0"}
    store.record(key, "t", {})
    store.origin = {"code": "2+def"}
    store.record(key, "t", {})
    found = store.get(key)
    assert found.identity == {"rollouts": [parent], "method": "cropi"}
    assert found.inputs == (parent,)
    assert found.origin == {"code": "1+abc", "settings": "settings-0"}
    assert abs(datetime.fromisoformat(found.created_at).timestamp() - time.time()) < 60


def test_an_object_collected_before_its_commit_comes_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection between the put and the commit does not lose a file."""
    commit, collected = store.catalog.commit, list[int]()

    def collect_first(*args: Any) -> Any:
        if not collected:
            collected.append(collect(store, grace_seconds=0).objects)
        return commit(*args)

    monkeypatch.setattr(store.catalog, "commit", collect_first)
    store.record("key", "t", {}, {"f": b"x"})
    assert collected == [1] and store.objects.exists(store.get("key").files["f"])
    assert store.file("key", "t", "f").read_bytes() == b"x"


@pytest.mark.parametrize("way", ["written piece by piece", "merged"])
def test_what_cannot_be_put_again_is_not_committed(
    store: Store, tmp_path: Path, rollouts: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """A shard whose file, or a merged file, is collected before its commit is not there afterwards; a repeat works."""
    other = open_store(tmp_path / "other")
    other.record("merged", "t", {}, {"f": b"from elsewhere"})
    act, key = (
        (lambda: merge(store, other), "merged")
        if way == "merged"
        else (lambda: store.trajectories.write("shard", rollouts(0), {}), "shard")
    )
    commit = store.catalog.commit

    def collect_first(*args: Any) -> Any:
        assert collect(store, grace_seconds=0).objects == 1
        return commit(*args)

    with monkeypatch.context() as patch:
        patch.setattr(store.catalog, "commit", collect_first)
        with pytest.raises(Missing, match=f"of {key} was collected before its commit; repeat the step"):
            act()
    assert not store.done(key)
    act()
    assert store.done(key) and all(verdict.wrong is None for verdict in verify(store))


def test_keys_survive_copies() -> None:
    """A key is the same key, with its identity, after pickling and copying."""
    key = Key("score-0", {"seed": 1})
    assert copy.deepcopy(key) == key and copy.deepcopy(key).identity == {"seed": 1}


def test_an_inner_lease_leaves_the_outer_in_force(store: Store) -> None:
    """After a nested block the outer lease fences again."""
    with store.hold("outer") as outer:
        with store.hold("inner"):
            pass
        assert store.lease == outer
    assert store.lease is None


def test_files_are_compared_by_content() -> None:
    """A File is its digest and size."""
    assert File("a", 1) == File("a", 1) != File("a", 2)
