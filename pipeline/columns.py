"""Columns of a pool of any size: the places of ids, values at places, names of numbers. Arrow for texts and gaps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int, Shaped


def texts(values: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return a column of strings in one chunk."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return values.cast(pa.string()) if isinstance(values, pa.Array) else pa.array(values, pa.string())


def places(uids: pa.Array | pa.ChunkedArray, among: pa.Array) -> Int[np.ndarray, " uids"]:
    """Return the place of each id among others; -1 where it is not there."""
    return pc.index_in(texts(uids), value_set=among).fill_null(-1).to_numpy(zero_copy_only=False)


def spread(size: int, rows: Int[np.ndarray, " values"], values: Shaped[np.ndarray, " values"]) -> pa.Array:
    """Return a column of ``size`` that has values at some rows, the last of several, and None elsewhere.

    >>> spread(3, np.array([2, 0]), np.array([1.5, 2.5])).to_pylist()
    [2.5, None, 1.5]
    """
    column, empty = np.zeros(size, values.dtype), np.ones(size, bool)
    column[rows], empty[rows] = values, False
    return pa.array(column, mask=empty)


def words(codes: Int[np.ndarray, " rows"], names: Sequence[str]) -> pa.Array:
    """Return the names of numbers; None for a number below zero.

    >>> words(np.array([1, -1], np.int8), ("a", "b")).to_pylist()
    ['b', None]
    """
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(names)).cast(pa.string())
