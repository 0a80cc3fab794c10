"""Parquet: equal columns give equal bytes, and a page that rotted is not read."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import Damaged, StoreError
from stores.parquet import decode, encode, to_table, to_values

ROW = st.tuples(
    st.text(max_size=5),
    st.none() | st.integers(-(2**63), 2**63 - 1),
    st.none() | st.floats(allow_nan=False),
    st.lists(st.integers(0, 9), max_size=3),
    st.booleans(),
)


@given(rows=st.lists(ROW, min_size=1, max_size=8))
@settings(max_examples=25, deadline=None)
def test_columns_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, ...]]) -> None:
    """Strings, whole numbers, floats, lists, booleans and None come back as they were, and twice the same bytes."""
    columns = dict(zip("abcde", map(list, zip(*rows, strict=True)), strict=True))
    data = encode(to_table(columns))
    path = tmp_path_factory.mktemp("parquet") / "file"
    path.write_bytes(data)
    assert {name: decode(path)[name].to_pylist() for name in columns} == columns
    assert encode(to_table(columns)) == data


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1.5], pa.int32()),
        ([2**40], pa.int32()),
        (["a"], pa.int32()),
        ([1], pa.string()),
        ([2**70], pa.int64()),
        (["\ud800"], pa.string()),
        ([1, "a"], None),
        (np.zeros((2, 2)), None),
        ([[1.5]], pa.list_(pa.int32())),
        ([["a"]], pa.list_(pa.int32())),
        ([None], pa.list_(pa.int32())),
        ([[2**40]], pa.list_(pa.int32())),
    ],
)
def test_values_that_do_not_fit_are_named(values: Any, kind: pa.DataType | None) -> None:
    """Nothing is rounded, cut or guessed on the way in: a value that does not fit names its column."""
    with pytest.raises(ValueError, match="column 'x' does not hold"):
        to_table({"x": values}, {} if kind is None else {"x": kind})


def test_unequal_and_absent_columns_are_refused() -> None:
    """Lengths that differ are named; no columns at all are an error."""
    with pytest.raises(ValueError, match=r"\{'a': 1, 'b': 2\}"):
        to_table({"a": [1], "b": [1, 2]})
    with pytest.raises(ValueError, match="at least one column"):
        to_table({})
    with pytest.raises(ValueError, match="JSON text"):
        encode(to_table({"a": [{}]}))


def test_a_column_of_none_is_float() -> None:
    """A column without any value is float64, whatever else could be guessed."""
    assert to_table({"a": [None, None]}).schema.field("a").type == pa.float64()


def test_list_rows_are_writable_arrays_across_chunks() -> None:
    """Rows of numbers come back as their own writable arrays, from sliced and chunked columns too."""
    table = to_table({"a": [[1], [], [2, 3], [4]]}, {"a": pa.list_(pa.int32())})
    rows = to_values(pa.concat_tables([table.slice(1, 2), table.slice(3)])["a"])
    assert [row.tolist() for row in rows] == [[], [2, 3], [4]]
    assert all(row.dtype == np.int32 and row.flags.writeable for row in rows)


def test_page_checksums_are_written_and_checked(tmp_path: Path) -> None:
    """Any bit flipped in the body of a page is Damaged, even when nobody compares the file's digest."""
    data = encode(to_table({"a": np.random.default_rng(0).integers(0, 2**62, 500)}))
    path = tmp_path / "file"
    path.write_bytes(data)
    column = pq.ParquetFile(path).metadata.row_group(0).column(0)
    begin = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    rng = np.random.default_rng(0)
    for place in rng.integers(begin + 200, begin + column.total_compressed_size, 30):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.integers(8))]) + data[place + 1 :])
        with pytest.raises(Damaged):
            decode(path)


def test_newer_files_are_refused(tmp_path: Path) -> None:
    """A file of a newer version is an error that says to upgrade."""
    table = to_table({"a": [1]}).replace_schema_metadata({"schema_version": "99"})
    pq.write_table(table, tmp_path / "file")
    with pytest.raises(StoreError, match=r"version 99.*upgrade"):
        decode(tmp_path / "file")
