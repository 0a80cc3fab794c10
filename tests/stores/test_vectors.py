"""Foreign vectors: the numbers of a file, whatever wrote it, and an error that names it where there are none."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stores.store import Store
from stores.vectors import read_vectors

ROWS = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)


def _index(kind: str) -> faiss.Index:
    index: faiss.Index = faiss.IndexScalarQuantizer(5, faiss.ScalarQuantizer.QT_fp16) if kind == "sq" else None
    index = index or (faiss.index_factory(5, "IVF2,Flat") if kind == "ivf" else faiss.IndexFlatIP(5))
    if kind == "ivf":
        index.train(ROWS)
    if kind == "ids":
        index = faiss.IndexIDMap2(index)
        index.add_with_ids(ROWS, np.arange(7) * 10)
    else:
        index.add(ROWS)
    return index


@pytest.mark.parametrize("form", ["npy", "parquet", "flat", "ids", "sq"])
def test_rows_come_back(tmp_path: Path, form: str) -> None:
    """Rows of every form come back as float32; those of half precision up to its rounding."""
    path = tmp_path / f"rows.{form if form in ('npy', 'parquet') else 'faiss'}"
    if form == "npy":
        np.save(path, ROWS.astype(np.float64))
    elif form == "parquet":
        pq.write_table(pa.table({"vector": ROWS.tolist()}), path)
    else:
        faiss.write_index(_index(form), str(path))
    found = read_vectors(path)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_allclose(found, ROWS, rtol=1e-3 if form == "sq" else 1e-7)


def test_foreign_rows_become_ours(store: Store, tmp_path: Path) -> None:
    """Rows of a foreign index are indexed anew, with our ids and norms."""
    faiss.write_index(_index("ids"), str(tmp_path / "rows.faiss"))
    uids = [f"prompt-{row}" for row in range(7)]
    names = {"policy": "p", "projection": "elsewhere", "objective": "grpo"}
    store.gradients.write("key", uids, read_vectors(tmp_path / "rows.faiss"), names)
    found, unit, norms = store.gradients.read("key")
    assert found == uids
    np.testing.assert_allclose(unit * norms[:, None], ROWS, atol=2e-3)


def test_what_has_no_rows_is_refused_by_name(tmp_path: Path) -> None:
    """Other suffixes, absent files, compressed indexes, ragged lists, text, and numbers that are not finite."""
    faiss.write_index(_index("ivf"), str(tmp_path / "ivf.faiss"))
    pq.write_table(pa.table({"vector": [[1.0], [1.0, 2.0]]}), tmp_path / "ragged.parquet")
    pq.write_table(pa.table({"other": [1.0]}), tmp_path / "column.parquet")
    np.save(tmp_path / "text.npy", np.array([["a"]]))
    np.save(tmp_path / "flat.npy", ROWS[0])
    np.save(tmp_path / "nan.npy", np.full((2, 2), np.nan))
    np.save(tmp_path / "huge.npy", np.full((2, 2), 1e300))
    np.savez(tmp_path / "archive.npz", rows=ROWS)
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    (tmp_path / "rows.csv").write_text("1,2")
    for name in (
        "ivf.faiss",
        "ragged.parquet",
        "column.parquet",
        "text.npy",
        "flat.npy",
        "nan.npy",
        "huge.npy",
        "archive.npy",
        "rows.csv",
    ):
        with pytest.raises(ValueError, match=name):
            read_vectors(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"absent\.npy"):
        read_vectors(tmp_path / "absent.npy")
