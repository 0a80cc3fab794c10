"""Generations of projected gradients, in FAISS: one row a prompt, as they were at one policy.

A row is kept as a unit vector in half precision with its norm beside it, and its id is the first 63 bits of the
SHA-256 of the prompt_uid. Cosines to a few targets are wanted for every row, so every row is scored: an exhaustive
scan is exact up to the rounding to half precision (about 3e-5 of a cosine at 1,024 dims), and needs no training.
Nothing is changed in place: rows are taken out by a tombstone beside them, and compaction writes another shard.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stores import index as indexes
from stores.errors import Damaged
from stores.index import SHIFT, Floats, Index
from stores.parquet import decode, encode, to_table
from stores.store import Store

KIND = "gradients"
TOMBSTONE = "tombstones"
INDEX = "index.faiss"
ROWS = "rows.parquet"
NAMES = ("policy", "projection", "objective")
"""What names a generation: rows that differ in any of these cannot be compared."""
_TYPES = {"uid": pa.string(), "id": pa.int64(), "norm": pa.float32()}


class Gradients:
    """Generations of a store, by key."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, key: str, uids: Sequence[str], features: Floats, meta: dict[str, Any]) -> str:
        """Commit a generation.

        Args:
            key: From `Store.key`.
            uids: The prompt_uid of each row, each once.
            features: (prompts, dim) float32, finite, without zero rows; there may be no rows at all.
            meta: JSON-able facts, with the non-empty strings `policy`, `projection` and `objective`; `rows` and `dim`
                are added.

        Returns:
            The key.

        Raises:
            ValueError: a shape, a name or a row that cannot be kept; the message names the first uid.
            Conflict: the key is taken by other content.
        """
        for name in NAMES:
            if not (isinstance(meta.get(name), str) and meta[name]):
                raise ValueError(f"meta[{name!r}] is {meta.get(name)!r}; a generation is named by {', '.join(NAMES)}")
        _check_shape(uids, features)
        ids, norms = row_ids(uids), _norms(uids, features)
        rows, dim = features.shape
        index = indexes.empty(dim)
        for start in range(0, rows, indexes.BLOCK):
            block = slice(start, start + indexes.BLOCK)
            unit = features[block].astype(np.float64) / norms[block, None]
            index.add_with_ids(unit.astype(np.float32), ids[block])
        return self._record(key, index, uids, norms.astype(np.float32), meta)

    def drop(self, key: str, shards: Sequence[str], uids: Sequence[str]) -> str:
        """Commit a tombstone: readers of some shards who name it leave these prompts out; no shard changes.

        Args:
            key: From `Store.key`.
            shards: Keys of gradients.
            uids: The prompts to leave out; one that a shard does not have is no error.

        Returns:
            The key.

        Raises:
            Missing, ValueError: a shard is not there, or is something else.
        """
        for shard in shards:
            self._store.expect(shard, KIND)
        return self._store.record(key, TOMBSTONE, {"shards": list(shards), "uids": sorted(set(uids))})

    def compact(self, key: str, shards: Sequence[str], without: Sequence[str] = ()) -> str:
        """Commit one shard with the rows of several, bit for bit, but for those under tombstones.

        The old shards stay for those who read them; `Catalog.retire` hands them to the collector.

        Args:
            key: From `Store.key`.
            shards: Keys of gradients of one generation, in the order to keep.
            without: Keys of tombstones.

        Returns:
            The key.

        Raises:
            ValueError: no shard, shards of different generations, or a prompt that is in two of them.
            Missing, Damaged: as for `read`.
        """
        metas = [self._store.expect(shard, KIND).meta for shard in shards]
        named = [[meta[name] for name in (*NAMES, "dim")] for meta in metas]
        if not named or any(names != named[0] for names in named):
            raise ValueError(f"shards are of the generations {named}; pass one or more shards of one generation")
        uids: list[str] = []
        norms: list[Floats] = []
        index = indexes.empty(metas[0]["dim"])
        for shard in shards:
            found, lengths, stored = self._open(shard)
            alive = self._alive(shard, found, without)
            kept = [found[row] for row in alive]
            uids, norms = uids + kept, [*norms, lengths[alive]]
            index.add_sa_codes(indexes.halves(stored)[alive].view(np.uint8), row_ids(kept))
        row_ids(uids)  # a prompt that is in two shards is an error
        return self._record(key, index, uids, np.concatenate(norms), metas[0])

    def read(self, key: str, without: Sequence[str] = ()) -> tuple[list[str], Floats, Floats]:
        """A whole shard.

        Args:
            key: A shard.
            without: Keys of tombstones.

        Returns:
            prompt_uids, unit rows (prompts, dim) and their norms (prompts), in stored order.

        Raises:
            Missing: the key has no gradients, or a tombstone is not there.
            Damaged: a file is not what was written.
        """
        uids, norms, index = self._open(key)
        rows = np.empty((len(uids), index.d), np.float32)
        for start, block in indexes.decoded(index):
            np.multiply(block, np.float32(SHIFT), out=rows[start : start + len(block)])
        alive = self._alive(key, uids, without)
        return [uids[row] for row in alive], rows[alive], norms[alive]

    def search(self, key: str, queries: Floats, without: Sequence[str] = ()) -> tuple[list[str], Floats]:
        """The cosine of every row to every query.

        Args:
            key: A shard.
            queries: (queries, dim) float32, finite and not zero; their lengths do not matter.
            without: Keys of tombstones.

        Returns:
            prompt_uids, and cosines (prompts, queries), in stored order.

        Raises:
            ValueError: queries of another shape, or one without a direction.
            Missing, Damaged: as for `read`.
        """
        uids, _, index = self._open(key)
        if queries.ndim != 2 or queries.shape[1] != index.d:
            raise ValueError(f"queries has shape {queries.shape}; the rows of {key} need (queries, {index.d})")
        lengths = _lengths(queries)
        bad = np.flatnonzero(~np.isfinite(lengths) | (lengths == 0))
        if bad.size:
            raise ValueError(f"queries[{bad[0]}] has length {lengths[bad[0]]}, hence no direction; leave it out")
        unit = queries / lengths[:, None]
        cosines, alive = indexes.cosines_with(index, unit), self._alive(key, uids, without)
        return ([uids[row] for row in alive], cosines[alive]) if without else (uids, cosines)

    def _record(self, key: str, index: Index, uids: Sequence[str], norms: Floats, meta: dict[str, Any]) -> str:
        table = to_table({"uid": uids, "id": indexes.ids_of(index), "norm": norms}, _TYPES)
        files: dict[str, bytes] = {INDEX: indexes.to_bytes(index), ROWS: encode(table)}
        return self._store.record(key, KIND, meta | {"rows": index.ntotal, "dim": index.d}, files)

    def _alive(self, key: str, uids: Sequence[str], without: Sequence[str]) -> NDArray[np.intp]:
        """The rows that no tombstone covers."""
        tombstones = [self._store.expect(tombstone, TOMBSTONE).meta for tombstone in without]
        dead = {uid for meta in tombstones if key in meta["shards"] for uid in meta["uids"]}
        return np.flatnonzero([uid not in dead for uid in uids]).astype(np.intp)

    def _open(self, key: str) -> tuple[list[str], Floats, Index]:
        artifact, (rows, path) = self._store.files(key, KIND, ROWS, INDEX)
        table, index = decode(rows), indexes.open_file(path, artifact.files[INDEX].size)
        uids = table["uid"].to_pylist()
        stored = indexes.ids_of(index)
        shape = (artifact.meta["rows"], artifact.meta["dim"])
        if (index.ntotal, index.d) != shape or not np.array_equal(stored, table["id"].to_numpy()):
            raise Damaged(f"gradients {key}: {path} and its rows disagree; repeat the step under another key")
        return uids, table["norm"].to_numpy().astype(np.float32), index


def row_ids(uids: Sequence[str]) -> NDArray[np.int64]:
    """The first 63 bits of the SHA-256 of each uid.

    Raises:
        ValueError: a uid is there twice, or two have the same 63 bits.
    """
    taken: dict[int, str] = {}
    for uid in uids:
        number = int.from_bytes(hashlib.sha256(uid.encode()).digest()[:8], "big") >> 1
        if number in taken:
            what = "is there twice" if taken[number] == uid else f"has the same id as {taken[number]!r}"
            raise ValueError(f"uid {uid!r} {what}; give each prompt one row")
        taken[number] = uid
    return np.array(list(taken), dtype=np.int64)


def _check_shape(uids: Sequence[str], features: Floats) -> None:
    if features.ndim != 2 or features.dtype != np.float32 or features.shape[1] == 0:
        raise ValueError(f"features has shape {features.shape} and type {features.dtype}; pass float32 (prompts, dim)")
    if len(uids) != len(features):
        raise ValueError(f"uids has {len(uids)} entries and features {len(features)} rows; give each row one uid")


def _lengths(rows: Floats) -> NDArray[np.float64]:
    """Row norms summed in double precision: squares of large float32 values overflow in single."""
    lengths: NDArray[np.float64] = np.sqrt(np.einsum("pd,pd->p", rows, rows, dtype=np.float64))
    return lengths


def _norms(uids: Sequence[str], features: Floats) -> NDArray[np.float64]:
    norms = _lengths(features)
    with np.errstate(over="ignore"):
        finite = np.isfinite(norms.astype(np.float32))
    if not finite.all():
        uid = uids[int(np.argmin(finite))]
        raise ValueError(f"the features of {uid!r} are not finite or too long for float32; find out where from")
    if not norms.all():
        uid = uids[int(np.argmin(norms))]
        raise ValueError(f"the features of {uid!r} are all zero and have no direction; leave that prompt out")
    return norms
