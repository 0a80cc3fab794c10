"""Columns to Parquet and back: equal columns give equal bytes, and every page carries a checksum that is checked."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stores.errors import Damaged, StoreError

VERSION = 1
ROWS = 2048
"""Rows in a row group: what a reader has in memory at a time."""
Column: TypeAlias = Sequence[Any] | NDArray[Any] | pa.Array
Columns = Mapping[str, Column]
_INFERRED: Mapping[str, pa.DataType] = MappingProxyType({})


def to_table(columns: Columns, types: Mapping[str, pa.DataType] = _INFERRED) -> pa.Table:
    """Equal-length columns as an Arrow table, in their order.

    Args:
        columns: Values by column name: lists, or one-dimensional arrays of NumPy or Arrow. A dict among them becomes a
            struct.
        types: The type of a column; where not given, inferred, and float64 when every value is None.

    Raises:
        ValueError: no columns, unequal lengths, or values that do not fit their type; the message names the column.
    """
    if not columns:
        raise ValueError("columns is empty; give at least one column")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns have unequal lengths {lengths}; give each column one value a row")
    return pa.table({name: to_array(name, values, types.get(name)) for name, values in columns.items()})


def to_array(name: str, values: Column, kind: pa.DataType | None = None) -> pa.Array:
    """One column as an Arrow array; types and errors as for `to_table`."""
    if kind is not None and pa.types.is_list(kind) and pa.types.is_primitive(kind.value_type):
        return _list_array(name, values, kind)
    try:
        if isinstance(values, pa.Array):
            array = values
        else:
            array = pa.array(values, kind if kind is not None and pa.types.is_nested(kind) else None)
        if kind is None:
            return array.cast(pa.float64()) if pa.types.is_null(array.type) else array
        if _is_text(kind) and not (_is_text(array.type) or pa.types.is_null(array.type)):
            raise TypeError(f"they are {array.type}")
        return array.cast(kind)
    except (ValueError, TypeError, OverflowError, pa.ArrowNotImplementedError) as error:
        wanted = "one type" if kind is None else str(kind)
        raise ValueError(f"column {name!r} does not hold values of {wanted}: {error}; convert them") from error


def to_values(column: pa.ChunkedArray) -> list[Any]:
    """The rows of a column: lists of numbers as writable NumPy arrays, everything else as plain Python values."""
    if pa.types.is_dictionary(column.type):  # a Python value for each entry of a dictionary is slow to come by
        column = column.cast(column.type.value_type)
    kind = column.type
    if not (pa.types.is_list(kind) and pa.types.is_primitive(kind.value_type)) or column.null_count:
        return list(column.to_pylist())
    rows: list[Any] = []
    for chunk in column.chunks:
        flat = np.array(chunk.values.to_numpy(zero_copy_only=False))
        offsets = chunk.offsets.to_numpy()
        rows.extend(flat[start:stop] for start, stop in pairwise(offsets))
    return rows


def encode(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file.

    Raises:
        ValueError: a column has a type that Parquet cannot hold.
    """
    buffer = io.BytesIO()
    try:
        with writer(buffer, table.schema) as file:
            file.write_table(_versioned(table), ROWS)
    except pa.ArrowNotImplementedError as error:
        raise ValueError(f"columns {table.schema.names}: {error}; store free-form dicts as JSON text") from error
    return buffer.getvalue()


def writer(
    sink: Any, schema: pa.Schema, dictionary: Sequence[str] | bool = True, split: Sequence[str] = ()
) -> pq.ParquetWriter:
    """A Parquet file to write table by table: `write_table(table)` is a row group.

    Args:
        sink: Where the bytes go.
        schema: The columns.
        dictionary: Paths of the columns with repeated values, or True for all.
        split: Paths of float columns to store byte plane by byte plane, which compresses better.
    """
    return pq.ParquetWriter(
        sink,
        schema.with_metadata({"schema_version": str(VERSION)}),
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=dictionary if isinstance(dictionary, bool) else list(dictionary),
        use_byte_stream_split=list(split),
    )


def decode(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file, or some of its columns, checking the checksum of every page.

    Raises:
        Damaged: the file is not what was written.
        StoreError: a newer version wrote it.
        ValueError: it has no column of a given name.
    """
    with _opened(path, columns) as file:
        table = file.read(None if columns is None else list(columns))
    return table if columns is None else table.select(list(columns))


def scan(path: Path, columns: Sequence[str], rows: int = ROWS) -> Iterator[pa.Table]:
    """The same, some rows at a time: what is in memory is a row group of the columns asked for; errors as there."""
    with _opened(path, columns) as file:
        for batch in file.iter_batches(rows, columns=list(columns)):
            yield pa.Table.from_batches([batch]).select(list(columns))


@contextmanager
def _opened(path: Path, columns: Sequence[str] | None) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            absent = [name for name in columns or () if name not in schema.names]
            if absent:
                raise ValueError(f"columns has {absent[0]!r}, and {path} has {schema.names}; ask for one of these")
            version = int((schema.metadata or {}).get(b"schema_version", b"0"))
            if version > VERSION:
                raise StoreError(f"{path} has schema version {version}, above {VERSION}; upgrade Influent")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise Damaged(f"Parquet file {path} cannot be read: {error}; restore it or repeat its step") from error


def _versioned(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata({"schema_version": str(VERSION)})


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _list_array(name: str, values: Column, kind: pa.ListType) -> pa.Array:
    """Rows of numbers, joined by NumPy: far cheaper than a Python object a number."""
    dtype = np.dtype(kind.value_type.to_pandas_dtype())
    try:
        rows = [np.asarray(row) for row in values]
        if any(row.ndim != 1 or (row.size and row.dtype.kind not in "iuf") for row in rows):
            raise ValueError("a row is not a list of numbers")
        flat = np.concatenate([np.empty(0, dtype), *(row for row in rows if row.size)])
        inside = pa.array(flat).cast(kind.value_type)
    except (ValueError, TypeError) as error:
        raise ValueError(f"column {name!r} does not hold lists of {kind.value_type}: {error}; convert them") from error
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"column {name!r} has {offsets[-1]} numbers, more than one file can hold; write it in shards")
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), inside)
