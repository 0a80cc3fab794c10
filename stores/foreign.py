"""Read a foreign FAISS file in a process of its own: ``python -m stores.foreign INDEX ROWS`` writes an array."""

import sys
from pathlib import Path

import faiss
import numpy as np


def extract(source: Path, target: Path) -> None:
    """Write the rows of an index as float32 (rows, dim).

    Raises:
        ValueError: the index does not hold its rows as they are, up to rounding.
        RuntimeError: FAISS refuses the file.
    """
    faiss.set_deserialization_vector_byte_limit(source.stat().st_size)
    index = faiss.read_index(str(source))
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexIDMap) else index
    if not isinstance(inner, faiss.IndexFlat | faiss.IndexScalarQuantizer):
        raise ValueError(f"a {type(inner).__name__} does not hold its rows as they are")
    np.save(target, inner.reconstruct_n(0, inner.ntotal))


if __name__ == "__main__":
    extract(Path(sys.argv[1]), Path(sys.argv[2]))
