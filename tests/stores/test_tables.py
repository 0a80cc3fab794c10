"""Tables: any columns, back as they were."""

import numpy as np
import pyarrow as pa
import pytest

from stores import Conflict, Missing
from stores.store import Store

COLUMNS = {
    "prompt_uid": ["a", "b"],
    "messages": [[{"role": "user", "content": "1+1?"}], [{"role": "user", "content": "é"}]],
    "score": [0.5, None],
    "rows": [1, None],
}


def test_columns_come_back(store: Store) -> None:
    """Scalars, None and lists of messages are read as written, in the order of the columns; meta has the rows."""
    store.tables.write("key", "prompts", COLUMNS, {"source": "x"})
    assert store.tables.read("key") == COLUMNS
    assert list(store.tables.read("key")) == list(COLUMNS)
    assert store.meta("key") == {"source": "x", "rows": 2}
    assert store.catalog.keys("prompts") == ["key"]


def test_the_same_columns_are_the_same_bytes(store: Store) -> None:
    """Lists and arrays of the same values, written twice, are one object."""
    store.tables.write("one", "scores", {"x": [0.1, 0.2], "n": [1, 2]}, {})
    store.tables.write("two", "scores", {"x": np.array([0.1, 0.2]), "n": np.array([1, 2])}, {})
    assert store.get("one").files == store.get("two").files
    with pytest.raises(Conflict, match=r"table\.parquet"):
        store.tables.write("one", "scores", {"x": [0.1, 0.3], "n": [1, 2]}, {})


def test_arrow_columns_are_the_same_bytes(store: Store) -> None:
    """Lists and Arrow columns of the same values are one object; some columns are read whole or a few rows at a time."""
    rows = 5000
    columns = {"uid": [f"u{i}" for i in range(rows)], "x": [None if i % 3 else i / 7 for i in range(rows)]}
    store.tables.write("one", "scores", columns, {})
    store.tables.write("two", "scores", {name: pa.array(values) for name, values in columns.items()}, {})
    assert store.get("one").files == store.get("two").files
    assert store.tables.arrow("one", ["x"]).to_pydict() == {"x": columns["x"]}
    parts = list(store.tables.scan("one", ["uid"]))
    assert max(map(len, parts)) <= 2048
    assert pa.concat_tables(parts).to_pydict() == {"uid": columns["uid"]}


def test_empty_tables_are_tables(store: Store) -> None:
    """A table may have no rows."""
    store.tables.write("key", "scores", {"x": [], "y": []}, {})
    assert store.tables.read("key") == {"x": [], "y": []}


def test_an_absent_table_is_missing(store: Store) -> None:
    """Reading a key that is not there is Missing."""
    with pytest.raises(Missing):
        store.tables.read("absent")
