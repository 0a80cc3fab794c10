"""Writing and reading of rollouts with the store's promises, against a bare Parquet file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.records import Rollouts
from stores import open_store
from tests.benchmarks.measure import Row, ratio
from tests.benchmarks.policies import arithmetic

SUBJECT = "stores"


def measure(small: bool) -> Iterator[Row]:
    """Yield what a commit and a verified reading cost."""
    many = Rollouts.concat([arithmetic(60, 2)] * (2 if small else 16)).columns()
    table = pa.table({name: list(column) for name, column in many.items()})
    with tempfile.TemporaryDirectory() as folder:
        store, number, bare = open_store(Path(folder) / "store"), count(), Path(folder) / "bare.parquet"
        yield Row(SUBJECT, f"commit {len(table):,} rollouts, checked and fsynced / bare Parquet write of a ready table",
                  ratio(lambda: store.trajectories.write(store.key("rollouts", n=next(number)), many, {}),
                        lambda: pq.write_table(table, bare, compression="zstd")))  # fmt: skip
        key = store.key("rollouts", n=0)
        yield Row(SUBJECT, "read them back, verified / bare Parquet read",
                  ratio(lambda: store.trajectories.read([key]), lambda: pq.read_table(bare).to_pydict()))  # fmt: skip
