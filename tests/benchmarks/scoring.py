"""Cosines of all stored prompts with one and with eight validation vectors, against reading their file once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

from stores import open_store
from tests.benchmarks.measure import Row, ratio

SUBJECT, SHARD = "scoring", 4096
NAMES = {"policy": "p", "projection": "s", "objective": "grpo"}


def measure(small: bool) -> Iterator[Row]:
    """Yield the ratios for 1e5 prompts of 8,192 numbers, in shards as a run writes them."""
    faiss.omp_set_num_threads(1)
    prompts, dim, rng = 4096 if small else 100_000, 8192, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store, keys = open_store(Path(folder)), []
        for start in range(0, prompts, SHARD):
            rows = rng.standard_normal((min(SHARD, prompts - start), dim), dtype=np.float32)
            uids = [str(start + i) for i in range(len(rows))]
            keys.append(store.gradients.write(store.key("gradients", n=start), uids, rows, NAMES))
        raw = [np.memmap(store.file(key, "gradients", "index.faiss"), np.uint8, "r") for key in keys]
        files = [file[: len(file) // 8 * 8].view(np.int64) for file in raw]
        for queries, bar in ((1, "<= 1.2"), (8, "<= 4")):
            aims = rng.standard_normal((queries, dim), dtype=np.float32)
            value = ratio(
                lambda aims=aims: [store.gradients.search(key, aims) for key in keys],
                lambda: [file.sum() for file in files],
            )
            yield Row(SUBJECT, f"score {prompts:,} prompts x {dim} against {queries} / read once", value, bar=bar,
                      note="half precision on disk, in the page cache; files verified before, once a process")  # fmt: skip
