"""Beliefs: whole counts, batch by batch, each batch once."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import Missing, open_store
from stores.store import Store


def test_history_keeps_the_order_of_batches(store: Store) -> None:
    """Each prompt has its counts in the order of the batches given, once each, and none for batches without it."""
    store.record("one", "trajectories", {}, counts=[("a", 1, 2), ("b", 0, 3)])
    store.record("two", "trajectories", {}, counts=[("a", 3, 0)])
    assert store.beliefs.history(["two", "one", "two"]) == {"a": [(3, 0), (1, 2)], "b": [(0, 3)]}
    assert store.beliefs.history([]) == {}


def test_an_absent_batch_is_missing(store: Store) -> None:
    """A batch that was never committed is an error, not an empty history."""
    with pytest.raises(Missing, match="'nowhere'"):
        store.beliefs.history(["nowhere"])


def test_only_verdicts_of_correctness_count(store: Store, rollouts: Callable) -> None:
    """Correct and incorrect rollouts move a belief; the others do not, and writing a shard again changes nothing."""
    columns = rollouts(0, samples=7)
    for _ in range(2):
        store.trajectories.write("batch", columns, {})
    expected: dict[str, list[tuple[int, int]]] = {}
    for uid in dict.fromkeys(columns["prompt_uid"]):
        mine = [verdict for name, verdict in zip(columns["prompt_uid"], columns["verdict"], strict=True) if name == uid]
        if set(mine) & {"correct", "incorrect"}:
            expected[uid] = [(mine.count("correct"), mine.count("incorrect"))]
    assert store.beliefs.history(["batch"]) == expected


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_replays_and_reopening_change_nothing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """However often batches are committed again and the store is opened again, each batch counts exactly once."""
    root = tmp_path_factory.mktemp("store")
    store, model = open_store(root), {}
    for _ in range(data.draw(st.integers(1, 8))):
        batch = data.draw(st.integers(0, 3))
        counts = [(f"p{uid}", batch, uid) for uid in range(batch + 1)]
        store.record(f"batch-{batch}", "trajectories", {}, {"f": bytes([batch])}, counts)
        model[f"batch-{batch}"] = counts
        if data.draw(st.booleans()):
            store = open_store(root)
        ledger = [(key, *count) for key, counts in model.items() for count in counts]
        assert store.catalog.counts(list(model)) == ledger
