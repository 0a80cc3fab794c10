"""Rollouts made elsewhere: read whole, completed by documented defaults, or refused with the file's name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stores.bundles import read_rollouts
from stores.store import Store
from stores.trajectories import SCHEMA

LEAST: dict[str, list[Any]] = {
    "prompt_uid": ["a", "b", "a"],
    "prompt_ids": [[1], [2, 3], [1]],
    "completion_ids": [[5, 6], [7], []],
    "logp_old": [[-0.5, -0.25], [-1.0], []],
    "verdict": ["correct", "incorrect", "truncated"],
}


def _lines(path: Path, columns: dict[str, list[Any]]) -> Path:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


def _plain(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [np.asarray(row).tolist() for row in values] for name, values in columns.items()}


@pytest.mark.parametrize("form", ["rollouts.parquet", "rollouts.jsonl", "folder"])
def test_defaults_fill_what_is_absent(tmp_path: Path, store: Store, form: str) -> None:
    """Parquet, JSON lines or a folder: the needed columns are enough, and the result can be stored as it is."""
    path = tmp_path / form
    if form == "folder":
        path.mkdir()
        for part, rows in (("b", slice(1, 3)), ("a", slice(0, 1))):
            pq.write_table(pa.table({name: LEAST[name][rows] for name in LEAST}), path / f"{part}.parquet")
    elif form.endswith("jsonl"):
        _lines(path, LEAST)
    else:
        pq.write_table(pa.table(LEAST), path)
    rollouts = read_rollouts(path)
    assert rollouts.keys() == SCHEMA.keys()
    assert _plain(rollouts) == LEAST | {
        "sample": [0, 0, 1],
        "policy": ["imported"] * 3,
        "step": [0] * 3,
        "temperature": [1.0] * 3,
        "finish_reason": ["stop"] * 3,
        "seed": [0] * 3,
        "text": [""] * 3,
        "reward": [1.0, 0.0, 0.0],
    }
    store.trajectories.write("key", rollouts, {})
    assert store.beliefs.history(["key"]) == {"a": [(1, 0)], "b": [(0, 1)]}


def test_what_is_there_is_kept(tmp_path: Path, rollouts: Callable) -> None:
    """Given columns win over defaults, and columns that nobody knows are left out."""
    columns = rollouts(0)
    path = _lines(tmp_path / "rollouts.jsonl", columns | {"note": ["x"] * 12})
    found = _plain(read_rollouts(path))
    assert found == {name: found[name] for name in SCHEMA} and found["seed"] == columns["seed"]
    assert found["text"] == columns["text"] and found["completion_ids"] == columns["completion_ids"]


def test_an_export_of_the_store_can_be_imported(tmp_path: Path, store: Store, rollouts: Callable) -> None:
    """A shard of one store is a file that another can import."""
    store.trajectories.write("key", rollouts(0), {})
    (tmp_path / "shard.parquet").write_bytes(store.file("key", "trajectories", "rollouts.parquet").read_bytes())
    store.trajectories.write("again", read_rollouts(tmp_path / "shard.parquet"), {})
    assert store.get("again").files == store.get("key").files


@pytest.mark.parametrize("name", list(LEAST))
@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_missing_column_is_named_with_its_file(tmp_path: Path, name: str, form: str) -> None:
    """A file without a needed column is refused, and the message names both."""
    columns = {column: values for column, values in LEAST.items() if column != name}
    path = tmp_path / f"rollouts.{form}"
    _lines(path, columns) if form == "jsonl" else pq.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=rf"rollouts\.{form} has no column {name};"):
        read_rollouts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"prompt_uid": "a"\n', r"x\.jsonl, line 1 is not JSON"),
        ("x.jsonl", "[1]\n", r"x\.jsonl, line 1 is not a JSON object"),
        ("x.jsonl", '{"verdict": "correct"}\n\n{"prompt_uid": "a"}\n', r"x\.jsonl, line 1 has no prompt_uid"),
        ("x.jsonl", "", r"x\.jsonl has no column"),
        ("x.parquet", "garbage", r"x\.parquet is not a readable Parquet file"),
        ("x.csv", "", r"x\.csv; pass a \.parquet file"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    """A file that cannot be read is refused with its name, and its line where it has lines."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rollouts(tmp_path / name)


def test_absent_files_are_not_found(tmp_path: Path) -> None:
    """A path where nothing is, or a folder without Parquet files, is an error."""
    for name in ("absent.parquet", "absent.jsonl"):
        with pytest.raises(FileNotFoundError):
            read_rollouts(tmp_path / name)
    with pytest.raises(ValueError, match=r"holds no \.parquet file"):
        read_rollouts(tmp_path)
