"""Any columns, one Parquet file a table: prompts, scores."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from stores.parquet import Columns, decode, encode, scan, to_table
from stores.store import Store

FILE = "table.parquet"


class Tables:
    """Tables of a store, by key."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, key: str, kind: str, columns: Columns, meta: dict[str, Any]) -> str:
        """Commit columns as a table; equal columns give equal bytes.

        Args:
            key: From `Store.key`.
            kind: What the table is.
            columns: Equal-length columns of scalars, lists or dicts with the same keys; None is allowed anywhere.
            meta: JSON-able facts; `rows` is added.

        Returns:
            The key.

        Raises:
            ValueError: unequal lengths, or a column of mixed types.
            Conflict: the key is taken by other content.
        """
        table = to_table(columns)
        return self._store.record(key, kind, meta | {"rows": table.num_rows}, {FILE: encode(table)})

    def read(self, key: str) -> dict[str, list[Any]]:
        """The columns of a table as lists of plain Python values.

        Raises:
            Missing: the key has no table.
            Damaged: the file is not what was written.
        """
        table = self.arrow(key)
        return {name: table[name].to_pylist() for name in table.column_names}

    def arrow(self, key: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The same, or some columns of it, as Arrow columns of one chunk each; errors as for `read`.

        Raises:
            ValueError: it has no column of a given name.
        """
        return decode(self._store.file(key, self._store.get(key).kind, FILE), columns).combine_chunks()

    def scan(self, key: str, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The same, about 2,048 rows at a time, for columns that do not fit in memory; errors as for `arrow`."""
        yield from scan(self._store.file(key, self._store.get(key).kind, FILE), columns)
