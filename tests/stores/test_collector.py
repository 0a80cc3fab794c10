"""The collector: what is referenced, leased or young stays, and all else goes, whatever happened before."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from stores import Damaged, open_store, rows
from stores.collector import collect, orphans
from stores.store import Store
from stores.verification import verify


class Collecting(RuleBasedStateMachine):
    """Random commits, orphans, retirements, leases and ages, beside a set that says what must be there."""

    store: Store

    def __init__(self) -> None:
        super().__init__()
        self.committed: dict[str, str] = {}  # key -> digest
        self.loose: dict[str, float] = {}  # digest of an orphan -> age
        self.retired: dict[str, tuple[str, float]] = {}  # key -> digest, age
        self.lease: tuple[Any, float] | None = None  # and its age
        self.number = 0

    @rule()
    def commit(self) -> None:
        self.number += 1
        key = f"key-{self.number}"
        self.store.record(key, "t", {}, {"f": key.encode()})
        self.committed[key] = self.store.get(key).files["f"].digest

    @rule()
    def orphan(self) -> None:
        self.number += 1
        self.loose[self.store.objects.put(f"orphan-{self.number}".encode()).digest] = 0.0

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.committed)))
        self.store.catalog.retire(key)
        self.retired[key] = self.committed.pop(key), 0.0

    @precondition(lambda self: self.lease is None)
    @rule()
    def take_a_lease(self) -> None:
        self.lease = self.store.leases.acquire("run", 1e6), 0.0

    @precondition(lambda self: self.lease is not None)
    @rule()
    def give_it_back(self) -> None:
        assert self.lease is not None
        self.store.leases.release(self.lease[0])
        self.lease = None

    @rule(seconds=st.sampled_from([10.0, 1000.0]))
    def time_passes(self, seconds: float) -> None:
        """Everything gets older: the clock cannot be moved, so what it wrote is."""
        self.loose = {digest: age + seconds for digest, age in self.loose.items()}
        self.retired = {key: (digest, age + seconds) for key, (digest, age) in self.retired.items()}
        for path in self.store.objects.folder.glob("*/*"):
            os.utime(path, (path.stat().st_mtime - seconds,) * 2)
        with self.store.catalog.database.transaction(write=True) as connection:
            for key in self.retired:
                rows.retire(connection, key, rows.find(connection, key).retired_at - seconds)
            connection.exec_driver_sql(f"update leases set acquired_at = acquired_at - {seconds}")
        if self.lease is not None:
            self.lease = self.lease[0], self.lease[1] + seconds

    @rule(grace=st.sampled_from([500.0, 5000.0]))
    def collect(self, grace: float) -> None:
        old = max(grace, self.lease[1] + 60.0 if self.lease else 0.0)
        gone = {key: digest for key, (digest, age) in self.retired.items() if age > grace}
        for key, digest in gone.items():  # its file was put before it was retired: at least as old
            self.loose[digest] = self.retired.pop(key)[1]
        expected = {digest for digest, age in self.loose.items() if age > old}
        before = set(orphans(self.store))
        assert collect(self.store, grace).objects >= len(expected)
        after = {digest for digest, _ in self.store.objects.listing()}
        assert not expected & after
        kept = {*self.committed.values(), *(digest for digest, _ in self.retired.values())}
        assert kept <= after
        if self.lease:  # what was put since it was taken stays
            assert {digest for digest, age in self.loose.items() if age < self.lease[1] and digest in before} <= after
        self.loose = {digest: age for digest, age in self.loose.items() if digest in after}

    @invariant()
    def everything_committed_is_whole(self) -> None:
        assert all(verdict.wrong is None for verdict in verify(self.store))
        assert set(self.store.catalog.keys()) == set(self.committed)


@pytest.mark.parametrize("steps", [20])
def test_only_old_garbage_is_collected(tmp_path_factory: pytest.TempPathFactory, steps: int) -> None:
    """Whatever is referenced, leased or young stays, and everything else goes, after any history."""
    from hypothesis.stateful import run_state_machine_as_test

    class OnDisk(Collecting):
        def __init__(self) -> None:
            super().__init__()
            self.store = open_store(tmp_path_factory.mktemp("store"))

    run_state_machine_as_test(OnDisk, settings=settings(max_examples=10, stateful_step_count=steps, deadline=None))


def test_orphans_and_temporaries_go(store: Store) -> None:
    """Old orphans and temporaries go, on each kind of store; what is referenced stays."""
    store.record("key", "t", {}, {"f": b"kept"})
    loose = store.objects.put(b"loose")
    store.objects.temporary().write_bytes(b"half")
    store.spool.add("shard", "group", {"text": ["waits for others"]})
    assert orphans(store) == [loose.digest]
    assert collect(store).objects == 0  # all of it is young
    found = collect(store, grace_seconds=0)
    assert (found.objects, found.temporaries) == (1, 2)
    assert orphans(store) == [] and not store.objects.exists(loose)
    assert store.file("key", "t", "f").read_bytes() == b"kept"


def test_local_copies_of_what_is_gone_go(place: tuple[Any, ...], tmp_path: Path) -> None:
    """A machine that cached an object which another machine collected drops its copy at its next collection."""
    here, there = open_store(*place), open_store(tmp_path / "other", *place[1:])
    here.record("key", "t", {}, {"f": b"shared"})
    if place[1] is None:
        return
    copy = there.file("key", "t", "f")
    here.catalog.retire("key")
    collect(here, grace_seconds=0)
    assert copy.exists()
    assert collect(there, grace_seconds=0).temporaries == 1
    assert not copy.exists()


def test_an_orphan_that_is_written_again_is_young(local: Store) -> None:
    """An old orphan that a step is about to reference is not collected."""
    path = local.objects.path(local.objects.put(b"x"))
    os.utime(path, (1, 1))
    local.objects.put(b"x")
    assert collect(local).objects == 0 and path.exists()


def test_what_a_leased_writer_put_stays(store: Store) -> None:
    """While a lease is held, nothing goes that was put since it was taken, however short the grace period."""
    with store.hold("run"):
        time.sleep(0.01)
        file = store.objects.put(b"not committed yet")
        assert collect(store, grace_seconds=0).objects == 0
        assert store.objects.exists(file)
    assert collect(store, grace_seconds=0).objects == 1


def test_a_negative_grace_period_is_refused(local: Store) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ValueError, match="grace_seconds = -1"):
        collect(local, -1)


def test_readers_keep_their_version(
    store: Store, names: dict[str, str], rollouts: Callable[..., dict[str, Any]]
) -> None:
    """A mapped generation answers the same across 50 commits, its own retirement and a collection at every fifth."""
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    store.gradients.write("generation", [str(row) for row in range(50)], rows, names)
    many = rollouts(0, samples=1500)  # three row groups: two are read while the collector works
    store.trajectories.write("shard", many, {})
    file = store.get("generation").files["index.faiss"]
    uids, norms, index = store.gradients._open("generation")
    before, queries = index.index.reconstruct_n(0, 50), rows[:2]
    reading = store.trajectories.scan(["shard"])
    first = next(reading)
    store.catalog.retire("generation")
    for number in range(50):
        store.record(f"key-{number}", "t", {}, {"f": str(number).encode()})
        store.gradients.write(f"next-{number}", ["a"], queries[:1], names)
        if number % 5 == 4:
            collect(store, grace_seconds=0)
    assert store.catalog.get("generation") is None and not store.objects.exists(file)
    np.testing.assert_array_equal(index.index.reconstruct_n(0, 50), before)
    assert len(uids) == len(norms) == 50
    assert [row for part in [first, *reading] for row in part["verdict"]] == many["verdict"]
    assert all(verdict.wrong is None for verdict in verify(store))


def test_a_damaged_catalog_is_not_collected(store: Store) -> None:
    """Where the catalog's rows are not what was committed, nothing is deleted: what they referenced is not known."""
    store.record("key", "t", {}, {"f": b"kept"})
    file = store.get("key").files["f"]
    with store.catalog.database.transaction(write=True) as connection:
        connection.exec_driver_sql(f"update files set digest = '{'0' * 64}'")
    with pytest.raises(Damaged, match="the entry of key"):
        collect(store, grace_seconds=0)
    assert store.objects.exists(file)


def test_groups_wait_while_anybody_collects(store: Store) -> None:
    """However old they are, groups that wait for their shard stay while a lease is held."""
    store.spool.add("shard", "group", {"text": ["x"]})
    os.utime(store.spool.file("shard"), (1, 1))
    with store.hold("run"):
        assert collect(store).temporaries == 0
    assert list(store.spool.read("shard")) == ["group"]
    assert collect(store).temporaries == 1


def test_folders_of_policies_go_with_them(store: Store, tmp_path: Path) -> None:
    """The links that a removed policy was loaded from are removed too, so that its bytes are freed."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "weights").write_bytes(b"w" * 1000)
    store.checkpoints.write("policy", tmp_path / "policy", {})
    folder = store.checkpoints.folder("policy")
    store.catalog.retire("policy")
    assert collect(store, grace_seconds=0).objects == 1
    assert not folder.exists()
