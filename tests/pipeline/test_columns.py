"""Columns: places, gaps and names as dictionaries have them."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.columns import places, spread, texts, words

names = st.lists(st.text(max_size=4), unique=True, max_size=8)


@given(names, st.lists(st.text(max_size=4), max_size=8))
def test_places_are_those_of_a_dictionary(among, asked):
    """Each id is where a dictionary has it, or at -1, whether it comes in one chunk or in many."""
    expected = [{uid: i for i, uid in enumerate(among)}.get(uid, -1) for uid in asked]
    assert places(texts(asked), texts(among)).tolist() == expected
    assert places(pa.chunked_array([[uid] for uid in asked], pa.string()), texts(among)).tolist() == expected


def test_a_column_without_rows_has_no_type_and_is_taken():
    """An empty column that was stored as numbers is one of strings."""
    assert places(pa.array([], pa.float64()), texts(["a"])).tolist() == []


@given(st.dictionaries(st.integers(0, 9), st.floats(allow_nan=False), max_size=10))
def test_a_spread_column_has_gaps(values):
    """Values stand at their rows, and None everywhere else."""
    rows = np.array(list(values), int)
    column = spread(10, rows, np.array(list(values.values()), float))
    assert column.to_pylist() == [values.get(row) for row in range(10)]


def test_numbers_get_their_names():
    """A number below zero has none."""
    assert words(np.array([1, -1, 0], np.int8), ("a", "b")).to_pylist() == ["b", None, "a"]
