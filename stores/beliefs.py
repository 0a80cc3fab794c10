"""What is known of each prompt: whole counts of successes and failures, batch by batch.

Counts are added and never changed: a batch is an artifact, and its counts are committed with it, once, however often
the commit is repeated. What older evidence is worth is decided when it is read, by whoever reads: `history` gives every
visit in order, with the step of its policy and the moment of its commit beside it on request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stores.entries import Count
from stores.store import Store

KIND = "counts"


@dataclass(frozen=True)
class Visit:
    """What one batch counted for one prompt.

    Attributes:
        batch: Its key.
        successes: Rollouts with the verdict `correct`.
        failures: Rollouts with the verdict `incorrect`.
        committed_at: When the batch was committed.
    """

    batch: str
    successes: int
    failures: int
    committed_at: datetime


class Beliefs:
    """The counts that batches committed: shards of trajectories, or counts alone."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def apply(self, key: str, counts: Sequence[Count], meta: dict[str, Any]) -> str:
        """Count a batch of which there are no rollouts to keep, such as pass rates that somebody measured.

        Args:
            key: From `Store.key`.
            counts: (prompt_uid, successes, failures), a prompt at most once.
            meta: JSON-able facts.

        Returns:
            The key. Applying a batch again changes nothing.

        Raises:
            Conflict: the key is taken by other content.
            ValueError: counts that are not whole numbers from 0 up, or a prompt twice.
        """
        return self._store.record(key, KIND, meta, counts=counts)

    def history(self, batches: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
        """The (successes, failures) of each prompt in each batch that counted it.

        Args:
            batches: Keys of batches, oldest first; one listed twice counts once.

        Returns:
            Counts by prompt_uid, in the order of `batches`. A batch that did not roll a prompt out adds nothing to it.

        Raises:
            Missing: a batch is not in the store.
            Damaged: the counts are not those that were committed.
        """
        history: dict[str, list[tuple[int, int]]] = {}
        for _, uid, successes, failures in self._store.catalog.counts(batches):
            history.setdefault(uid, []).append((successes, failures))
        return history

    def columns(self, batches: Sequence[str]) -> tuple[pa.Array, NDArray[np.int64], NDArray[np.int64]]:
        """The same as columns, for more prompts than a dict can hold: errors as for `history`.

        Returns:
            prompt_uid, successes and failures, one entry a visit: those of a prompt are in the order of `batches`.
        """
        uids, counts = [pa.array([], pa.string())], [np.empty((0, 2), np.int64)]
        for _, batch in self._store.catalog.scan_counts(batches):
            uids.append(pa.array([uid for uid, _, _ in batch], pa.string()))
            counts.append(np.array([found for _, *found in batch], np.int64).reshape(-1, 2))
        whole = np.concatenate(counts)
        return pa.concat_arrays(uids), whole[:, 0], whole[:, 1]

    def visits(self, batches: Sequence[str]) -> dict[str, list[Visit]]:
        """The same with the batch and the moment of each visit, for a discount by age; errors as for `history`."""
        moments = {batch: datetime.fromisoformat(self._store.get(batch).created_at) for batch in batches}
        found: dict[str, list[Visit]] = {}
        for batch, uid, successes, failures in self._store.catalog.counts(batches):
            found.setdefault(uid, []).append(Visit(batch, successes, failures, moments[batch]))
        return found

    def totals(self, batches: Sequence[str]) -> dict[str, tuple[int, int]]:
        """The (successes, failures) of each prompt over all of some batches; errors as for `history`."""
        return {
            uid: (sum(s for s, _ in visits), sum(f for _, f in visits)) for uid, visits in self.history(batches).items()
        }
