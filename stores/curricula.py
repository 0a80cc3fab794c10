"""Selections: every prompt with its stage, rank, scores and the reason it was taken or left."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from stores.parquet import Columns, decode, encode, to_table
from stores.store import Store

KIND = "selection"
FILE = "selection.parquet"
TYPES: dict[str, pa.DataType] = {
    "prompt_uid": pa.string(),
    "stage": pa.int32(),
    "reason": pa.string(),
    "rank": pa.int32(),
}
"""The columns that every selection has."""


class Curricula:
    """Selections of a store, by key."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, key: str, columns: Columns, meta: dict[str, Any]) -> str:
        """Commit a selection; equal columns give equal bytes.

        Args:
            key: From `Store.key`.
            columns: prompt_uid, stage, reason, rank (None where there is none), and any scores or strings beside them.
            meta: JSON-able facts; `rows` is added.

        Returns:
            The key.

        Raises:
            ValueError: a column is missing, of unequal length or of mixed types.
            Conflict: the key is taken by other content.
        """
        absent = [name for name in TYPES if name not in columns]
        if absent:
            raise ValueError(f"columns has no {absent}; a selection needs {list(TYPES)}")
        table = to_table(columns, TYPES)
        for name in ("prompt_uid", "reason"):
            if table[name].null_count:
                raise ValueError(f"column {name!r} has {table[name].null_count} empty rows; give every prompt one")
        return self._store.record(key, KIND, meta | {"rows": table.num_rows}, {FILE: encode(table)})

    def read(self, key: str) -> dict[str, list[Any]]:
        """The columns of a selection as lists of plain Python values.

        Raises:
            Missing: the key has no selection.
            Damaged: the file is not what was written.
        """
        table = self.arrow(key)
        return {name: table[name].to_pylist() for name in table.column_names}

    def arrow(self, key: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The same, or some columns of it, as Arrow columns of one chunk each; errors as for `read`.

        Raises:
            ValueError: it has no column of a given name.
        """
        return decode(self._store.file(key, KIND, FILE), columns).combine_chunks()
