"""FAISS indexes of unit rows in half precision, with ids: made, opened safely, scanned. The door to ``faiss``.

FAISS files carry no checksum and a damaged header can hang their reader: a file is opened only after its size and
SHA-256 have been checked, with a limit on what the reader may allocate, and is mapped rather than copied.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from stores.errors import Damaged

Floats = NDArray[np.float32]
Index = faiss.IndexIDMap2

BLOCK = 64
"""Rows encoded or decoded at a time: at 8,192 dims they stay in the processor's cache."""
SHIFT = 2.0**112
"""What moving a number's bits from half to single precision divides it by: the offsets of their exponents."""
_BITS = np.int32(-0x70002000)  # sign, exponent and mantissa of a half-precision number, where single precision has them
_READING = threading.Lock()  # the reader's limit belongs to the process


def empty(dim: int) -> Index:
    """An index without rows."""
    return Index(faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT))


def to_bytes(index: Index) -> bytes:
    """The index as the bytes of a file."""
    return bytes(faiss.serialize_index(index).tobytes())


def ids_of(index: Index) -> NDArray[np.int64]:
    """The ids of the rows, in stored order."""
    ids: NDArray[np.int64] = faiss.vector_to_array(index.id_map)
    return ids


def open_file(path: Path, size: int) -> Index:
    """Map a file of ours whose bytes have been verified.

    Args:
        path: The file.
        size: Its size: the reader may allocate no more.

    Raises:
        Damaged: it is not such an index.
    """
    with _READING:
        limit = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(size)
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise Damaged(f"FAISS file {path} cannot be read: {error}; restore it or repeat its step") from error
        finally:
            faiss.set_deserialization_vector_byte_limit(limit)
    if not isinstance(index, Index):
        raise Damaged(f"FAISS file {path} holds a {type(index).__name__}, not an IndexIDMap2; repeat its step")
    if not isinstance(faiss.downcast_index(index.index), faiss.IndexScalarQuantizer) or (
        _codes(index).size() != 2 * index.ntotal * index.d
    ):
        raise Damaged(f"FAISS file {path} does not hold rows in half precision; repeat its step")
    return index


def cosines_with(index: Index, unit: NDArray[np.float64]) -> Floats:
    """Every row times every unit query."""
    cosines = np.empty((index.ntotal, len(unit)), np.float32)
    if len(unit) == 1 and index.ntotal:  # FAISS multiplies as it decodes, which for one query is the cheapest
        scores, rows = index.index.search(unit.astype(np.float32), index.ntotal)
        cosines[rows[0], 0] = scores[0]
        return cosines
    lifted = np.ascontiguousarray((unit * SHIFT).astype(np.float32).T)
    for start, block in decoded(index):
        np.matmul(block, lifted, out=cosines[start : start + len(block)])
    return cosines


def halves(index: Index) -> NDArray[np.int16]:
    """The rows as they are stored, the bits of half-precision numbers (rows, dim); valid as long as the index is."""
    codes = _codes(index)
    bits: NDArray[np.int16] = faiss.rev_swig_ptr(codes.data(), codes.size()).view(np.int16)
    return bits.reshape(index.ntotal, index.d)


def decoded(index: Index) -> Iterator[tuple[int, Floats]]:
    """Blocks of unit rows divided by `SHIFT`, in stored order, each with the position of its first row.

    FAISS decodes number by number and NumPy converts half precision in software. Moving the bits is exact, also for
    subnormal numbers, and five times faster. A block is overwritten by the next.
    """
    if not index.ntotal:
        return
    bits = halves(index)
    buffer = np.empty((min(BLOCK, index.ntotal), index.d), np.int32)
    for start in range(0, index.ntotal, BLOCK):
        block = buffer[: min(BLOCK, index.ntotal - start)]
        np.copyto(block, bits[start : start + BLOCK])  # the sign fills the upper half
        np.left_shift(block, 13, out=block)
        np.bitwise_and(block, _BITS, out=block)
        yield start, block.view(np.float32)


def _codes(index: Index) -> Any:
    quantizer: Any = faiss.downcast_index(index.index)
    return quantizer.codes
