"""Beliefs: whole counts, batch by batch, each batch once."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from pipeline.beliefs import from_history
from stores import Missing, StoreError, open_store
from stores.merge import merge
from stores.store import Store
from tests.stores.conftest import failing_statement


def test_history_keeps_the_order_of_batches(store: Store) -> None:
    """Each prompt has its counts in the order of the batches given, once each, and none for batches without it."""
    store.record("one", "trajectories", {}, counts=[("a", 1, 2), ("b", 0, 3)])
    store.record("two", "trajectories", {}, counts=[("a", 3, 0)])
    assert store.beliefs.history(["two", "one", "two"]) == {"a": [(3, 0), (1, 2)], "b": [(0, 3)]}
    assert store.beliefs.history([]) == {}


def test_columns_are_the_history(store: Store) -> None:
    """More batches than are read at a time, as columns: the same visits in the same order."""
    batches = [f"batch-{number}" for number in range(40)]
    for number, batch in enumerate(batches):
        store.beliefs.apply(batch, [(f"p{(number + i) % 7}", number, i) for i in range(number % 4)], {})
    found: dict[str, list[tuple[int, int]]] = {}
    for uid, *counts in zip(*(column.tolist() for column in store.beliefs.columns(batches)), strict=True):
        found.setdefault(uid, []).append((counts[0], counts[1]))
    assert found == store.beliefs.history(batches)
    assert [len(column) for column in store.beliefs.columns([])] == [0, 0, 0]


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


class Counting(RuleBasedStateMachine):
    """Batches applied, replayed, interrupted, merged and read again, beside a dict that counts each once."""

    fresh: ClassVar[Callable[[], tuple[Any, ...]]]
    """Gives a place for a store, as `open_store` takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.elsewhere = self.fresh(), self.fresh()
        self.store = open_store(*self.place)
        self.other = open_store(*self.elsewhere)
        self.model: dict[str, dict[str, tuple[int, int]]] = {}

    @rule(number=st.integers(0, 5), seed=st.integers(0, 3))
    def apply(self, number: int, seed: int) -> None:
        """Apply a batch, or replay it; the same key never means anything else."""
        counts = [(f"p{(number + step) % 4}", (number + seed) % 3, step) for step in range(3)]
        key = f"batch-{number}-{seed}"
        self.store.beliefs.apply(key, counts, {})
        self.model[key] = {uid: (won, lost) for uid, won, lost in counts}

    @rule(number=st.integers(0, 5), place=st.integers(1, 12), told=st.booleans())
    def crash(self, number: int, place: int, told: bool) -> None:
        """The n-th statement of a commit fails, before or after it is done; then the step is repeated, or not."""
        key = f"crash-{number}"
        with suppress(StoreError), failing_statement(self.store, place, after=told):
            self.store.beliefs.apply(key, [("p0", number, 1)], {})
        if self.store.done(key):
            self.model[key] = {"p0": (number, 1)}

    @rule()
    def reopen(self) -> None:
        """The process ends, and another goes on."""
        self.store = open_store(*self.place)

    @rule(number=st.integers(0, 3))
    def elsewhere_too(self, number: int) -> None:
        """Another store has a batch, perhaps one that this one has too; the two are merged."""
        key = f"merged-{number}"
        self.other.beliefs.apply(key, [("p1", number, number)], {})
        merge(self.store, self.other)
        merged = self.other.catalog.keys()
        self.model |= {key: {"p1": (int(key[-1]), int(key[-1]))} for key in merged}

    @invariant()
    def every_batch_counts_once(self) -> None:
        """The ledger has the model's batches, and the counts are their sums."""
        keys = self.store.catalog.keys()
        assert set(keys) == set(self.model)
        expected: dict[str, tuple[int, int]] = {}
        for batch in self.model.values():
            for uid, (won, lost) in batch.items():
                before = expected.get(uid, (0, 0))
                expected[uid] = before[0] + won, before[1] + lost
        assert self.store.beliefs.totals(keys) == expected
        with self.store.catalog.database.transaction() as connection:
            row = connection.exec_driver_sql("select count(*), sum(successes), sum(failures) from counts").one()
        assert tuple(int(n or 0) for n in row[1:]) == tuple(sum(t[i] for t in expected.values()) for i in range(2))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("catalog", ["sqlite", "postgres"])
def test_batches_count_exactly_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, torture: int, catalog: str
) -> None:
    """Under replays, crashes at any statement, reopening and merges, every batch is counted once and none is lost."""
    database = request.getfixturevalue("postgres") if catalog == "postgres" else lambda: None

    class Here(Counting):
        fresh = staticmethod(lambda: (tmp_path_factory.mktemp("store"), database(), None))

    examples = (8 if catalog == "sqlite" else 4) * torture
    run_state_machine_as_test(Here, settings=settings(max_examples=examples, stateful_step_count=15, deadline=None))


def test_reading_with_a_discount_changes_nothing(store: Store) -> None:
    """Any discount is applied by the reader: to recorded visits, or to their age; what is kept stays as it was."""
    for number in range(3):
        store.beliefs.apply(f"batch-{number}", [("p", number, 4 - number)], {"step": 10 * number})
    keys = [f"batch-{number}" for number in range(3)]
    history = store.beliefs.history(keys)
    beliefs = {rate: from_history(["p"], history, discount=rate) for rate in (1.0, 0.5)}
    assert [float(value[0]) for value in beliefs[1.0]] == [1 + 0 + 1 + 2, 1 + 4 + 3 + 2]
    alpha = 0.5 * (0.5 * (0.5 * 1 + 0.5 + 0) + 0.5 + 1) + 0.5 + 2
    assert float(beliefs[0.5][0][0]) == alpha
    visits = store.beliefs.visits(keys)["p"]
    now = max(visit.committed_at for visit in visits)
    aged = sum(visit.successes * 0.5 ** ((now - visit.committed_at).total_seconds() / 3600) for visit in visits)
    assert aged == pytest.approx(3, rel=0.01)
    assert [(visit.successes, visit.failures) for visit in visits] == history["p"] == store.beliefs.history(keys)["p"]
    assert [store.meta(visit.batch)["step"] for visit in visits] == [0, 10, 20]
