"""The latest rollouts of some prompts, found by one pass over who is in which shard, and read without the others'."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stores.parquet import to_values
from stores.trajectories import SCHEMA, Trajectories

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Latest:
    """Which shard holds how many of the latest rollouts of each prompt; a *visit* is one prompt in one shard.

    Attributes:
        trajectories: The shards.
        keys: Theirs, oldest first.
        uids: The prompts.
        visits: One a row (shard, prompt, stored, wanted): places in `keys` and in `uids`, rollouts in the shard, and
            how many of these, the last ones, are among the latest; by shard, and only those of which some are.
    """

    trajectories: Trajectories
    keys: Sequence[str]
    uids: pa.Array
    visits: Rows

    @property
    def held(self) -> Rows:
        """The places in `uids` of the prompts that have rollouts, in order."""
        return np.unique(self.visits[:, 1])

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[Rows, pa.Table]]:
        """The latest rollouts of all prompts, shard by shard, about 2,048 at a time: places in `uids`, and columns."""
        yield from self._scan(self.visits, columns)

    def read(self, places: Sequence[int] | Rows) -> dict[str, list[Any]]:
        """The latest rollouts of some prompts, prompt by prompt in the order asked for, each oldest first.

        Args:
            places: Of the prompts in `uids`, each once. Shards that hold none of them are not opened.

        Returns:
            Lists by column name, as `Trajectories.read` gives them.
        """
        wanted = np.full(len(self.uids), -1, np.int64)
        wanted[np.asarray(places, np.int64)] = np.arange(len(places))
        found: dict[str, list[Any]] = {name: [] for name in SCHEMA}
        turns = [np.empty(0, np.int64)]
        for prompt, table in self._scan(self.visits[wanted[self.visits[:, 1]] >= 0], list(SCHEMA)):
            turns.append(wanted[prompt])
            for name, values in found.items():
                values.extend(to_values(table[name]))
        order = np.argsort(np.concatenate(turns), kind="stable").tolist()
        return {name: [values[row] for row in order] for name, values in found.items()}

    def _scan(self, visits: Rows, columns: Sequence[str]) -> Iterator[tuple[Rows, pa.Table]]:
        names = list(dict.fromkeys(["prompt_uid", *columns]))
        for shard in np.unique(visits[:, 0]):
            first, last = np.searchsorted(visits[:, 0], [shard, shard + 1])
            _, prompt, stored, wanted = visits[first:last].T
            uids, left = self.uids.take(pa.array(prompt)), stored.copy()  # left: of each prompt, still to come
            for table in self.trajectories.tables([self.keys[int(shard)]], names):
                row = _places(table["prompt_uid"], uids)
                ours = np.flatnonzero(row >= 0)
                still = left[row[ours]] - _occurrence(row[ours])
                left -= np.bincount(row[ours], minlength=len(left))
                ours = ours[still <= wanted[row[ours]]]
                if len(ours):
                    yield prompt[row[ours]], table.select(list(columns)).take(pa.array(ours))


def latest(trajectories: Trajectories, keys: Sequence[str], uids: Sequence[str] | pa.Array, recent: int) -> Latest:
    """Find the at most `recent` latest rollouts of each prompt; of the shards only the column of prompts is read.

    Args:
        trajectories: Of a store.
        keys: Of shards, oldest first.
        uids: The prompts, each once.
        recent: How many to take of a prompt at most.

    Raises:
        Missing, Damaged: as for `Trajectories.read`.
    """
    uids = uids if isinstance(uids, pa.Array) else pa.array(uids, pa.string())
    names, numbers = [pa.array([], pa.string())], [np.empty((0, 2), np.int64)]
    for shard, key in enumerate(keys):
        parts = [_plain(table["prompt_uid"]) for table in trajectories.tables([key], ["prompt_uid"])]
        counts = pc.value_counts(pa.chunked_array(parts, pa.string()))
        names.append(counts.field("values"))
        stored = counts.field("counts").to_numpy()
        numbers.append(np.stack([np.full(len(stored), shard), stored], axis=1))
    prompt, (shard_of, stored) = _places(pa.concat_arrays(names), uids), np.concatenate(numbers).T
    ours = prompt >= 0
    prompt, shard_of, stored = prompt[ours], shard_of[ours], stored[ours]
    wanted = np.clip(recent - _later(prompt, stored), 0, stored)
    visits = np.stack([shard_of, prompt, stored, wanted], axis=1)
    return Latest(trajectories, keys, uids, visits[wanted > 0])


def _later(prompt: Rows, stored: Rows) -> Rows:
    """How many rollouts the later visits of the same prompt have."""
    order = np.argsort(prompt, kind="stable")[::-1]
    before = np.cumsum(stored[order]) - stored[order]
    first = np.flatnonzero(np.diff(prompt[order], prepend=-1))
    later = np.empty_like(stored)
    later[order] = before - np.repeat(before[first], np.diff([*first, len(order)]))
    return later


def _occurrence(row: Rows) -> Rows:
    """How often each value was there before, in the order given."""
    order = np.argsort(row, kind="stable")
    first = np.flatnonzero(np.diff(row[order], prepend=-1))
    found = np.empty_like(row)
    found[order] = np.arange(len(row)) - np.repeat(first, np.diff([*first, len(row)]))
    return found


def _places(values: pa.Array | pa.ChunkedArray, among: pa.Array) -> Rows:
    """Where each value is among others; -1 where it is not."""
    found = pc.index_in(_plain(values), value_set=among)
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _plain(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column of strings without its dictionary, in one chunk."""
    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return whole.cast(pa.string())
