"""Curricula: every prompt with its stage, rank, scores and reason, the same bytes for the same selection."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import open_store
from stores.store import Store

ROW = st.tuples(
    st.text(min_size=1, max_size=8),
    st.integers(0, 5),
    st.sampled_from(["selected", "budget", "no_signal"]),
    st.none() | st.integers(0, 100),
    st.none() | st.floats(),
)
COLUMNS: dict[str, list[Any]] = {
    "prompt_uid": ["a", "b"],
    "stage": [0, 1],
    "reason": ["selected", "budget"],
    "rank": [0, None],
}


@given(rows=st.lists(ROW, min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_selections_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, ...]]) -> None:
    """Stages, reasons, ranks and scores come back as written, with None and NaN apart, and equal bytes each time."""
    store = open_store(tmp_path_factory.mktemp("store"))
    columns = dict(zip([*COLUMNS, "score"], map(list, zip(*rows, strict=True)), strict=True))
    columns["unscored"] = [None] * len(rows)
    store.curricula.write("one", columns, {"budget": 3})
    store.curricula.write("two", columns, {"budget": 4})
    assert store.get("one").files == store.get("two").files
    found = store.curricula.read("one")
    for name in columns:
        for value, wanted in zip(found[name], columns[name], strict=True):
            assert value == wanted or (wanted is not None and math.isnan(value) and math.isnan(wanted))


@pytest.mark.parametrize("name", list(COLUMNS))
def test_a_missing_column_is_named(store: Store, name: str) -> None:
    """Each of the four columns is needed."""
    with pytest.raises(ValueError, match=name):
        store.curricula.write("key", {k: v for k, v in COLUMNS.items() if k != name}, {})


def test_every_prompt_has_a_reason(store: Store) -> None:
    """A prompt without a reason is an error."""
    with pytest.raises(ValueError, match="'reason' has 1 empty"):
        store.curricula.write("key", COLUMNS | {"reason": ["selected", None]}, {})


def test_another_kind_is_refused(store: Store) -> None:
    """A table's key is not a selection's."""
    store.tables.write("key", "scores", COLUMNS, {})
    with pytest.raises(ValueError, match="'scores', not 'selection'"):
        store.curricula.read("key")
