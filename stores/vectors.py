"""Vectors that were made elsewhere, read as plain numbers and checked, to be written again as ours.

Taken are `.npy` files, `.parquet` files with a column of lists, and `.faiss` files with flat or scalar-quantised rows.
A FAISS file can hang or corrupt the process that reads it, so it is read by a child process with limits on memory and
time, which hands back nothing but an array of numbers. A child is not a sandbox: take FAISS files from people you know.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

_SECONDS = 600
_SPARE = 2 << 30  # bytes of address space for the child beside three times the file


def read_vectors(path: Path, column: str = "vector") -> NDArray[np.float32]:
    """Read the rows of a file for `Gradients.write`.

    Args:
        path: A `.npy` (rows, dim), `.parquet` or `.faiss` file.
        column: The column of a Parquet file that holds lists of numbers, all of one length.

    Returns:
        (rows, dim) float32, finite.

    Raises:
        ValueError: the file is not readable as such, needs code to be read, or holds anything but finite rows of one
            length; the message names it and says what to do.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"vectors {path}: there is no such file; pass a .npy, .parquet or .faiss file")
    readers = {".npy": _read_array, ".parquet": lambda file: _read_column(file, column), ".faiss": _read_index}
    if path.suffix not in readers:
        raise ValueError(f"vectors {path}: pass a {', '.join(readers)} file; save the rows with numpy.save")
    rows = readers[path.suffix](path)
    numbers = rows.ndim == 2 and rows.dtype.kind in "fiu"
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(rows, np.float32) if numbers else None
    if single is None or not np.isfinite(single).all():
        raise ValueError(
            f"vectors {path} holds {rows.dtype} of shape {rows.shape}, or numbers that are not finite in float32; "
            "save finite rows (rows, dim)"
        )
    return single


def _read_array(path: Path) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of arrays")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"vectors {path} is no array of numbers: {error}; save the rows with numpy.save") from error
    return array


def _read_column(path: Path, column: str) -> NDArray[np.generic]:
    try:
        values = pq.read_table(path, columns=[column], page_checksum_verification=True)[column].combine_chunks()
        rows: NDArray[np.generic] = np.stack([np.asarray(row) for row in values.to_pylist()])
    except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"vectors {path}, column {column!r}: {error}; give lists of numbers of one length") from error
    return rows


def _read_index(path: Path) -> NDArray[np.generic]:
    limit = 3 * path.stat().st_size + _SPARE
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.npy"
        try:
            done = subprocess.run(
                [sys.executable, "-m", "stores.foreign", str(path.absolute()), str(out)],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                cwd=Path(__file__).parents[1],
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"vectors {path} took FAISS over {_SECONDS} s; export its rows with numpy.save") from error
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"the reader ended with {done.returncode}"])[-1]
            raise ValueError(f"vectors {path} is no index with rows to be had: {why}; export its rows with numpy.save")
        return _read_array(out)
