"""Rollouts, in Parquet shards. A shard and its belief counts are one commit: neither is ever without the other."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stores.entries import Count
from stores.objects import File
from stores.parquet import ROWS, Column, Columns, scan, to_table, to_values, writer
from stores.store import Store

KIND = "trajectories"
FILE = "rollouts.parquet"
FILE_BYTES = 128 << 20
"""From this size on a shard goes on in another file."""
_LABEL = pa.dictionary(pa.int32(), pa.string())
SCHEMA: dict[str, pa.DataType] = {
    "prompt_uid": _LABEL,
    "sample": pa.int32(),
    "policy": _LABEL,
    "step": pa.int32(),
    "prompt_ids": pa.list_(pa.int32()),
    "completion_ids": pa.list_(pa.int32()),
    "logp_old": pa.list_(pa.float32()),
    "temperature": pa.float32(),
    "finish_reason": _LABEL,
    "seed": pa.int64(),
    "text": pa.string(),
    "reward": pa.float32(),
    "verdict": _LABEL,
}
"""The columns of a shard, all of them needed. `logp_old` is under the policy that sampled."""
_REPEATED = (
    *(name for name, kind in SCHEMA.items() if kind == _LABEL),
    "prompt_ids.list.element",
    "completion_ids.list.element",
)
_SPLIT = ("logp_old.list.element",)


class Trajectories:
    """Shards of rollouts of a store, by key."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, key: str, columns: Columns, meta: dict[str, Any]) -> str:
        """Commit a shard and its belief counts: per prompt the verdicts `correct` and `incorrect`, and no others.

        Args:
            key: From `Store.key`.
            columns: Exactly the columns of `SCHEMA`, of equal length, without None. `logp_old` has one finite number
                (nats) for each of `completion_ids`.
            meta: JSON-able facts; `rows` is added.

        Returns:
            The key. Writing the same shard twice counts it once.

        Raises:
            ValueError: a column is missing, unknown, of unequal length or with values that do not fit.
            Conflict: the key is taken by other content.
        """
        return self.write_all(key, [columns], meta)

    def write_all(self, key: str, parts: Iterable[Columns], meta: dict[str, Any]) -> str:
        """Commit a shard that arrives in parts, each no larger than fits in memory; all of them or none are there.

        Args:
            key: From `Store.key`.
            parts: The columns of some rollouts each, as for `write`. They are written as they come, into files of
                about `FILE_BYTES`.
            meta: JSON-able facts; `rows` is added.

        Returns:
            The key; errors as for `write`.
        """
        tally: dict[str, list[int]] = {}
        tables = (self._checked(columns, tally) for columns in parts)
        files: dict[str, File] = {}
        rows, table = 0, next(tables, _nothing())
        while table is not None:
            with self._store.objects.writer() as new, writer(new, table.schema, _REPEATED, _SPLIT) as file:
                file.write_table(table, ROWS)
                rows += table.num_rows
                while (table := next(tables, None)) is not None and new.size < FILE_BYTES:
                    file.write_table(table, ROWS)
                    rows += table.num_rows
            name = FILE if not files else f"rollouts.{len(files):05d}.parquet"
            files[name] = File(new.digest, new.size)
        return self._store.record(key, KIND, meta | {"rows": rows}, files, _counts(tally))

    def read(self, keys: Sequence[str], columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
        """The columns of some shards, one after the other.

        Args:
            keys: Keys of shards, in the order to read.
            columns: Names to read, in this order; all when None.

        Returns:
            Lists by column name: NumPy arrays for token ids (int32) and log-probabilities (float32), plain values else.

        Raises:
            Missing: a key is not in the store.
            Damaged: a file is not what was written.
            ValueError: there is no such column.
        """
        found: dict[str, list[Any]] = {name: [] for name in _names(columns)}
        for part in self.scan(keys, columns):
            for name, values in part.items():
                found[name].extend(values)
        return found

    def scan(self, keys: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[dict[str, list[Any]]]:
        """The same, about 2,048 rollouts at a time: no column that was not asked for is read; errors as for `read`."""
        names = _names(columns)
        for table in self.tables(keys, names):
            yield {name: to_values(table[name]) for name in names}

    def tables(self, keys: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
        """The same as Arrow tables; errors as for `read`."""
        names = _names(columns)
        for key in keys:
            artifact = self._store.expect(key, KIND)
            files = sorted(artifact.files, key=lambda name: (name != FILE, name))
            for path in self._store.files(key, KIND, *files)[1]:
                yield from scan(path, names)

    @staticmethod
    def _checked(columns: Columns, tally: dict[str, list[int]]) -> pa.Table:
        _check_names(columns)
        table = to_table({name: columns[name] for name in SCHEMA}, SCHEMA)
        _check_values(table)
        _tally(tally, columns["prompt_uid"], columns["verdict"])
        return table


def count(uids: Column, verdicts: Column) -> list[Count]:
    """(prompt_uid, successes, failures) of the prompts with a correct or incorrect rollout, by first appearance.

    >>> count(["a", "b", "a", "c"], ["correct", "incorrect", "incorrect", "timeout"])
    [('a', 1, 1), ('b', 0, 1)]
    """
    tally: dict[str, list[int]] = {}
    _tally(tally, uids, verdicts)
    return _counts(tally)


def _tally(tally: dict[str, list[int]], uids: Column, verdicts: Column) -> None:
    for uid, verdict in zip(uids, verdicts, strict=True):
        tally.setdefault(str(uid), [0, 0])
        if verdict in ("correct", "incorrect"):
            tally[str(uid)][verdict == "incorrect"] += 1


def _counts(tally: dict[str, list[int]]) -> list[Count]:
    return [(uid, successes, failures) for uid, (successes, failures) in tally.items() if successes + failures]


def _names(columns: Sequence[str] | None) -> list[str]:
    names = list(SCHEMA) if columns is None else list(columns)
    unknown = [name for name in names if name not in SCHEMA]
    if unknown:
        raise ValueError(f"columns has {unknown[0]!r}; trajectories have {list(SCHEMA)}")
    return names


def _nothing() -> pa.Table:
    return to_table({name: [] for name in SCHEMA}, SCHEMA)


def _check_names(columns: Columns) -> None:
    absent = [name for name in SCHEMA if name not in columns]
    unknown = [name for name in columns if name not in SCHEMA]
    if absent or unknown:
        raise ValueError(f"columns lacks {absent} and has the unknown {unknown}; a shard has exactly {list(SCHEMA)}")


def _check_values(table: pa.Table) -> None:
    for name in SCHEMA:
        if table[name].null_count:
            raise ValueError(f"column {name!r} has {table[name].null_count} rows of None; give every rollout a value")
    uids, logps = table["prompt_uid"], table["logp_old"].combine_chunks()
    tokens = pc.list_value_length(table["completion_ids"]).to_numpy()
    numbers = pc.list_value_length(logps).to_numpy()
    unequal = np.flatnonzero(tokens != numbers)
    if unequal.size:
        row = int(unequal[0])
        raise ValueError(
            f"column 'logp_old' has {numbers[row]} numbers for the {tokens[row]} completion_ids of row {row}, prompt "
            f"{uids[row]}; give one a token"
        )
    broken = np.flatnonzero(~np.isfinite(logps.values.to_numpy()))
    if broken.size:
        row = int(np.searchsorted(logps.offsets.to_numpy(), broken[0], side="right")) - 1
        raise ValueError(f"column 'logp_old' is not finite in row {row}, prompt {uids[row]}; leave that rollout out")
