"""The one place where a selection is written down and read again, and the columns that it is made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flows import evidence
from flows.desk import Desk
from pipeline.columns import places, spread, words
from pipeline.records import REASONS

if TYPE_CHECKING:
    from pipeline.curriculum import Selection
    from stores.canonical import Spelled


def targets_of(table: Iterable[str]) -> list[str]:
    """Return those columns of a table of scores or of a selection that hold an alignment with a validation set."""
    return [name for name in table if name.startswith(("cosine_", "dot_"))]


def read_scores(desk: Desk, scores: str, pool: pa.Array) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return the place in the pool of each scored prompt, the names of the scores, and these (prompts, scores)."""
    table = desk.store.tables.arrow(scores)
    names = targets_of(table.column_names)
    values = np.empty((len(table), len(names)))
    for column, name in enumerate(names):
        values[:, column] = table[name].to_numpy()
    return places(table["prompt_uid"], pool), names, values


def spell_reasons(desk: Desk, data: str, reason: np.ndarray) -> Spelled:
    """Return who gets no gradient and why, by prompt_uid, as the key of a selection has it."""
    from stores.canonical import spell_pairs

    out = np.flatnonzero(reason >= 0)
    uids = desk.pool(data).take(pa.array(out))
    order = pc.array_sort_indices(uids)
    return spell_pairs(uids.take(order), words(reason[out], REASONS).take(order))


def stage(desk: Desk, selection: str, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Return the rows of a selection that are in its stage, best first: some of its columns, all by default."""
    names = None if columns is None else list(dict.fromkeys([*columns, "rank"]))
    table = desk.store.curricula.arrow(selection, names)
    picked = table.filter(pc.is_valid(table["rank"])).sort_by("rank")
    return {name: picked[name].to_pylist() for name in picked.column_names}


def chosen(desk: Desk, selection: str) -> list[str]:
    """Return the prompt_uids of a stage, best first."""
    return stage(desk, selection, ["prompt_uid"])["prompt_uid"]


def reasons(desk: Desk, selection: str) -> Counter[str]:
    """Return how many prompts of a selection have each reason."""
    found = pc.value_counts(desk.store.curricula.arrow(selection, ["reason"])["reason"])
    return Counter({row["values"]: row["counts"] for row in found.to_pylist()})


def together(desk: Desk, keys: Sequence[str]) -> dict[str, pa.Array]:
    """Return several selections as one, in their order, whole numbers as int64; None where one lacks a column."""
    tables = [desk.store.curricula.arrow(key) for key in keys]
    whole = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    columns = {name: whole[name].combine_chunks() for name in whole.column_names}
    return {name: c.cast(pa.int64()) if pa.types.is_integer(c.type) else c for name, c in columns.items()}


def write(
    desk: Desk,
    key: str,
    data: str,
    rollouts: Sequence[str],
    chosen: Selection,
    stage: int,
    measured: Mapping[str, pa.Array],
) -> None:
    """Store a stage with all that is known of each prompt of the pool at the moment of selection.

    ``measured`` holds further columns, a row each of the pool and of what was left out when it was read: the cosines,
    and how stale the evidence is.
    """
    from pipeline.curriculum import DRAWN
    from pipeline.selectors import insight

    pool, (out, why) = desk.pool(data), desk.excluded(data)
    uids, picked = pa.concat_arrays([pool, out]), len(chosen.chosen)
    size, rated = len(uids), np.flatnonzero(~np.isnan(chosen.fused))
    alpha, beta, counts = evidence.beliefs(desk, rollouts, uids)
    value = insight.score(alpha, beta, rollouts=desk.config.train.rollouts, **desk.config.insight.weight)
    seen = counts.sum(axis=0)
    drawn = np.full(size, -1, np.int8)
    drawn[chosen.chosen] = chosen.drawn
    columns: dict[str, Any] = {
        "prompt_uid": uids,
        "stage": np.full(size, stage, np.int32),
        "reason": pa.concat_arrays([words(chosen.reason, REASONS), why]),
        "rank": spread(size, chosen.chosen, np.arange(picked, dtype=np.int32)),
        "drawn": words(drawn, DRAWN),
        "score_influence": spread(size, rated, chosen.fused[rated]),
        "score_wmi": value,
        "pass_rate": spread(size, np.flatnonzero(seen), counts[0][seen > 0] / seen[seen > 0]),
        "n_obs": seen,
        "alpha": alpha,
        "beta": beta,
        "ess": pa.nulls(size, pa.float64()),
        "log_ratio_p99": pa.nulls(size, pa.float64()),
    } | dict(measured)
    desk.store.curricula.write(key, columns, {"data": data, "stage": stage, "size": picked})
