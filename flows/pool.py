"""Prompts as a run's store has them: who is in the pool, and the prompts of a split, read as columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.records import Prompts

if TYPE_CHECKING:
    from stores.store import Store


@dataclass(frozen=True)
class Pool:
    """Who is in a pool.

    Attributes:
        splits: number of eligible prompts of each split.
        eligible: prompt_uids of the pool.
        out: those that were left out.
        reason: why, of each.
    """

    splits: dict[str, int]
    eligible: pa.Array
    out: pa.Array
    reason: pa.Array


def read_pool(store: Store, data: str) -> Pool:
    """Read who is in the pool of a key, without their texts."""
    splits, parts = Counter[str](), []
    for table in store.tables.scan(data, ["prompt_uid", "split", "reason"]):
        fit = pc.equal(table["reason"], "")
        splits.update(dict.fromkeys(table["split"].unique().to_pylist(), 0))
        for found in pc.value_counts(table["split"].filter(fit)).to_pylist():
            splits[found["values"]] += found["counts"]
        parts.append(table.filter(pc.equal(table["split"], "pool")).select(["prompt_uid", "reason"]))
    whole = pa.concat_tables(parts)
    fit = pc.equal(whole["reason"], "")
    eligible, out = whole["prompt_uid"].filter(fit), whole.filter(pc.invert(fit))
    columns = (eligible, out["prompt_uid"], out["reason"])
    return Pool(dict(splits), *(column.combine_chunks() for column in columns))


def read_prompts(store: Store, data: str, split: str, uids: Sequence[str] | None = None) -> Prompts:
    """Read the eligible prompts of a split, or some of them, in the order of the data set."""
    names = [field.name for field in fields(Prompts)]
    where = store.tables.arrow(data, ["prompt_uid", "split", "reason"])
    ours = pc.and_(pc.equal(where["split"], split), pc.equal(where["reason"], ""))
    if uids is not None:
        ours = pc.and_(ours, pc.is_in(where["prompt_uid"], value_set=pa.array(uids, pa.string())))
    parts, row = [], 0
    for table in store.tables.scan(data, names):
        parts.append(table.filter(ours.slice(row, len(table))))
        row += len(table)
    whole = pa.concat_tables(parts)
    return Prompts.of({name: whole[name].to_pylist() for name in names})
