"""Generations of projected gradients, in FAISS: one row a prompt, as they were at one policy.

A row is kept as a unit vector in half precision with its norm beside it, and its id is the first 63 bits of the
SHA-256 of the prompt_uid. Cosines to a few targets are wanted for every row, so every row is scored: an exhaustive
scan is exact up to the rounding to half precision (about 3e-5 of a cosine at 1,024 dims), and needs no training.
FAISS files carry no checksum and a damaged header can hang their reader: a file is opened only after its size and
SHA-256 have been checked, with a limit on what the reader may allocate, and is mapped rather than copied.
"""

import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stores.errors import Damaged
from stores.parquet import decode, encode, to_table
from stores.store import Store

Floats = NDArray[np.float32]

KIND = "gradients"
INDEX = "index.faiss"
ROWS = "rows.parquet"
NAMES = ("policy", "projection", "objective")
"""What names a generation: rows that differ in any of these cannot be compared."""
_TYPES = {"uid": pa.string(), "id": pa.int64(), "norm": pa.float32()}
_BLOCK = 64  # rows encoded or decoded at a time: at 8,192 dims they stay in the processor's cache
_SHIFT = 2.0**112  # what moving a number's bits from half to single precision divides it by: the exponents' offsets
_BITS = np.int32(-0x70002000)  # sign, exponent and mantissa of a half-precision number, where single precision has them
_READING = threading.Lock()  # the reader's limit belongs to the process


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
        index = _empty_index(dim)
        for start in range(0, rows, _BLOCK):
            block = slice(start, start + _BLOCK)
            unit = features[block].astype(np.float64) / norms[block, None]
            index.add_with_ids(unit.astype(np.float32), ids[block])
        table = to_table({"uid": uids, "id": ids, "norm": norms.astype(np.float32)}, _TYPES)
        files: dict[str, bytes | Path] = {INDEX: faiss.serialize_index(index).tobytes(), ROWS: encode(table)}
        return self._store.record(key, KIND, meta | {"rows": rows, "dim": dim}, files)

    def read(self, key: str) -> tuple[list[str], Floats, Floats]:
        """A whole generation.

        Returns:
            prompt_uids, unit rows (prompts, dim) and their norms (prompts), in stored order.

        Raises:
            Missing: the key has no generation.
            Damaged: a file is not what was written.
        """
        uids, norms, index = self._open(key)
        rows = np.empty((len(uids), index.d), np.float32)
        for start, block in _decoded(index):
            np.multiply(block, np.float32(_SHIFT), out=rows[start : start + len(block)])
        return uids, rows, norms

    def search(self, key: str, queries: Floats) -> tuple[list[str], Floats]:
        """The cosine of every row to every query.

        Args:
            key: A generation.
            queries: (queries, dim) float32, finite and not zero; their lengths do not matter.

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
        cosines = np.empty((len(uids), len(queries)), np.float32)
        if len(unit) == 1 and uids:  # FAISS multiplies as it decodes, which for one query is the cheapest
            scores, rows = index.index.search(unit.astype(np.float32), len(uids))
            cosines[rows[0], 0] = scores[0]
            return uids, cosines
        lifted = np.ascontiguousarray((unit * _SHIFT).astype(np.float32).T)
        for start, block in _decoded(index):
            np.matmul(block, lifted, out=cosines[start : start + len(block)])
        return uids, cosines

    def _open(self, key: str) -> tuple[list[str], Floats, faiss.IndexIDMap2]:
        artifact, (rows, path) = self._store.files(key, KIND, ROWS, INDEX)
        table, index = decode(rows), _read_index(path, artifact.files[INDEX].size)
        uids = table["uid"].to_pylist()
        stored = faiss.vector_to_array(index.id_map)
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


def _empty_index(dim: int) -> faiss.IndexIDMap2:
    codes = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    return faiss.IndexIDMap2(codes)


def _read_index(path: Path, size: int) -> faiss.IndexIDMap2:
    with _READING:
        limit = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(size)
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise Damaged(f"FAISS file {path} cannot be read: {error}; restore it or repeat its step") from error
        finally:
            faiss.set_deserialization_vector_byte_limit(limit)
    if not isinstance(index, faiss.IndexIDMap2):
        raise Damaged(f"FAISS file {path} holds a {type(index).__name__}, not an IndexIDMap2; repeat its step")
    if not isinstance(faiss.downcast_index(index.index), faiss.IndexScalarQuantizer) or (
        _codes(index).size() != 2 * index.ntotal * index.d
    ):
        raise Damaged(f"FAISS file {path} does not hold rows in half precision; repeat its step")
    return index


def _decoded(index: faiss.IndexIDMap2) -> Iterator[tuple[int, Floats]]:
    """Blocks of unit rows divided by `_SHIFT`, in stored order, each with the position of its first row.

    FAISS decodes number by number and NumPy converts half precision in software. Moving the bits is exact, also for
    subnormal numbers, and five times faster. A block is overwritten by the next.
    """
    if not index.ntotal:
        return
    codes = _codes(index)
    halves = faiss.rev_swig_ptr(codes.data(), codes.size()).view(np.int16).reshape(index.ntotal, index.d)
    buffer = np.empty((min(_BLOCK, index.ntotal), index.d), np.int32)
    for start in range(0, index.ntotal, _BLOCK):
        block = buffer[: min(_BLOCK, index.ntotal - start)]
        np.copyto(block, halves[start : start + _BLOCK])  # the sign fills the upper half
        np.left_shift(block, 13, out=block)
        np.bitwise_and(block, _BITS, out=block)
        yield start, block.view(np.float32)


def _codes(index: faiss.IndexIDMap2) -> Any:
    quantizer: Any = faiss.downcast_index(index.index)
    return quantizer.codes
