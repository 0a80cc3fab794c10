"""What the store's promises cost: commits against a plain fsynced write, rollouts against bare Parquet, belief updates."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.records import Rollouts
from stores import open_store
from stores.store import Store
from stores.verification import verify
from tests.benchmarks.measure import Row, ratio, seconds
from tests.benchmarks.policies import arithmetic

SUBJECT, PART = "stores", 2048
NARROW = ["prompt_uid", "reward", "verdict"]


def measure(small: bool) -> Iterator[Row]:
    """Yield what commits, rollouts and beliefs cost."""
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder) / "store")
        yield from _commits(store, Path(folder))
        yield from _rollouts(store, Path(folder), 2 if small else 40)
        yield _beliefs(store, 20_000 if small else 400_000)
        yield _scan(store)


def _commits(store: Store, folder: Path) -> Iterator[Row]:
    number, turn, other = count(), count(), count()
    for size in (1 << 20, 25 << 20):
        fresh = [os.urandom(size) for _ in range(12)]  # an object that is there already would cost nothing

        def commit(fresh: list[bytes] = fresh) -> None:
            n = next(number)
            store.record(f"commit-{n}", "t", {}, {"f": fresh[next(turn) % 6]})

        def plain(fresh: list[bytes] = fresh) -> None:
            with (folder / f"plain-{next(number)}").open("wb") as file:
                file.write(fresh[6 + next(other) % 6])
                file.flush()
                os.fsync(file.fileno())

        value = ratio(commit, plain)
        yield Row(SUBJECT, f"commit of {size >> 20} MiB / plain fsynced write of as much", value,
                  note="SHA-256, two folder syncs and the catalog's transaction besides")  # fmt: skip


def _rollouts(store: Store, folder: Path, parts: int) -> Iterator[Row]:
    one = Rollouts.concat([arithmetic(60, 2)] * 8)
    columns: dict[str, Any] = {name: list(column)[:PART] for name, column in one.columns().items()}
    rows, table, number, bare = len(columns["seed"]), pa.table(columns), count(), folder / "bare.parquet"

    def write() -> None:
        store.trajectories.write_all(store.key("rollouts", n=next(number)), (columns for _ in range(parts)), {})

    def plain() -> None:
        with pq.ParquetWriter(bare, table.schema, compression="zstd") as file:
            for _ in range(parts):
                file.write_table(table)
        with bare.open("rb+") as file:
            os.fsync(file.fileno())

    yield Row(SUBJECT, f"commit {parts * rows:,} rollouts in parts, checked and fsynced / bare Parquet of ready tables",
              ratio(write, plain, pairs=3))  # fmt: skip
    key = store.key("rollouts", n=0)

    def scan(names: list[str] | None) -> int:
        return sum(1 for _ in store.trajectories.scan([key], names))

    def bare_scan(names: list[str] | None) -> int:
        with pq.ParquetFile(bare) as file:
            return sum(1 for batch in file.iter_batches(PART, columns=names) if batch.to_pydict())

    yield Row(SUBJECT, "scan them back, verified / bare Parquet scan to Python",
              ratio(lambda: scan(None), lambda: bare_scan(None), pairs=3))  # fmt: skip
    yield Row(SUBJECT, "scan three narrow columns / bare Parquet scan of them",
              ratio(lambda: scan(NARROW), lambda: bare_scan(NARROW), pairs=3))  # fmt: skip
    yield Row(SUBJECT, "rollouts written a second", parts * rows / seconds(write), unit="/s")
    yield Row(SUBJECT, "rollouts scanned a second, all columns", parts * rows / seconds(lambda: scan(None)), unit="/s")


def _beliefs(store: Store, updates: int) -> Row:
    batches = [[(f"prompt-{n}", n % 9, 8 - n % 9) for n in range(start, start + 10_000)]
               for start in range(0, updates, 10_000)]  # fmt: skip
    spent = seconds(lambda: [store.beliefs.apply(f"b-{n}", batch, {}) for n, batch in enumerate(batches)])
    return Row(
        SUBJECT, "belief updates a minute, SQLite, 10,000 a batch", 60 * updates / spent, unit="/min", bar=">= 1e6"
    )


def _scan(store: Store) -> Row:
    read: list[int] = []
    spent = seconds(lambda: read.extend(verdict.read for verdict in verify(store)))
    return Row(SUBJECT, "full verification", sum(read) / 2**20 / spent, unit="MiB/s")
