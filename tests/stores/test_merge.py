"""Merging two stores: what one lacks is copied, what both have counts once, and what differs is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stores import Conflict, Damaged, open_store, rows, seals
from stores.lineage import lineage
from stores.merge import Merged, merge
from stores.store import Store
from stores.verification import verify

Rollouts = Callable[..., dict[str, Any]]


@pytest.fixture
def other(tmp_path: Path) -> Store:
    """A second store, local."""
    return open_store(tmp_path / "other")


def test_counts_of_both_are_added_once(store: Store, other: Store, rollouts: Rollouts) -> None:
    """After a merge, and after any number more, the target has every batch of both exactly once."""
    for number, keeper in enumerate((store, other)):
        keeper.trajectories.write("shared", rollouts(9), {})
        keeper.trajectories.write(f"own-{number}", rollouts(number), {})
        keeper.beliefs.apply(f"counts-{number}", [("prompt-0", number, 2)], {})
    key = other.key("score", rollouts="own-1")
    other.origin = {"code": "1"}
    other.record(key, "t", {}, {"f": b"x"})
    batches = ["shared", "own-0", "own-1", "counts-0", "counts-1"]
    apart = [keeper.beliefs.totals([b for b in batches if keeper.done(b)]) for keeper in (store, other)]
    shared = store.beliefs.totals(["shared"])
    assert merge(store, other) == Merged(copied=3, present=1)
    assert merge(store, other) == Merged(copied=0, present=4)
    for uid, total in store.beliefs.totals(batches).items():
        parts = [part.get(uid, (0, 0)) for part in apart]
        twice = shared.get(uid, (0, 0))
        assert total == tuple(sum(part[i] for part in parts) - twice[i] for i in range(2))
    assert lineage(store, key) == lineage(other, key)
    assert store.trajectories.read(["own-1"]).keys() == other.trajectories.read(["own-1"]).keys()
    assert store.trajectories.read(["own-1"], ["text"]) == other.trajectories.read(["own-1"], ["text"])
    assert all(verdict.wrong is None for verdict in verify(store))


def test_other_content_under_a_key_stops_the_merge_before_it_begins(store: Store, other: Store) -> None:
    """A key that means two things is a conflict that names it, and nothing is copied."""
    other.record("first", "t", {})
    for keeper, counts in ((store, [("p", 1, 0)]), (other, [("p", 0, 1)])):
        keeper.beliefs.apply("batch", counts, {})
    with pytest.raises(Conflict, match=r"key batch differs .*counts"):
        merge(store, other)
    assert not store.done("first")


def test_merged_evidence_keeps_its_age(store: Store, other: Store) -> None:
    """A batch is as old in the target as it is in its source."""
    other.beliefs.apply("batch", [("p", 1, 0)], {})
    with other.catalog.database.transaction(write=True) as connection:
        row = {**rows.find(connection, "batch")._mapping, "created_at": "2020-01-01T00:00:00+00:00"}
        seal = seals.of_entry(row, [], [])
        connection.exec_driver_sql(f"update artifacts set created_at = '{row['created_at']}', seal = '{seal}'")
    merge(store, other)
    assert store.beliefs.visits(["batch"])["p"][0].committed_at.year == 2020


def test_a_damaged_source_is_not_copied(store: Store, other: Store, overwrite: Callable[..., None]) -> None:
    """What is damaged there does not arrive here, and the merge goes on once it is mended."""
    other.record("key", "t", {}, {"f": b"whole"})
    file = other.get("key").files["f"]
    overwrite(other, file, b"wrong")
    with pytest.raises(Damaged):
        merge(store, other)
    assert not store.done("key")
    overwrite(other, file, b"whole")
    assert merge(store, other).copied == 1
    assert store.file("key", "t", "f").read_bytes() == b"whole"
