"""Rollouts that were made elsewhere: Parquet and JSON lines files, checked and completed on the way in."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stores.parquet import to_values

NEEDED = ("prompt_uid", "prompt_ids", "completion_ids", "logp_old", "verdict")
DEFAULTS: dict[str, Any] = {
    "policy": "imported",
    "step": 0,
    "temperature": 1.0,
    "finish_reason": "stop",
    "seed": 0,
    "text": "",
}
"""What an absent column is filled with. Besides: `sample` counts the rollouts of a prompt from 0 over all files, and
`reward` is 1.0 where the verdict is `correct` and 0.0 elsewhere."""
_KNOWN = (*NEEDED, *DEFAULTS, "sample", "reward")


def read_rollouts(path: Path) -> dict[str, list[Any]]:
    """Read rollouts for `Trajectories.write`.

    Args:
        path: A `.parquet` or `.jsonl` file, or a folder of `.parquet` files, read in the order of their names.

    Returns:
        The columns of `stores.trajectories.SCHEMA`: those of `NEEDED` as they are in the file, the others too where
        they are there, and by `DEFAULTS` where not. Further columns are left out.

    Raises:
        ValueError: the file is unreadable or lacks a needed column; the message names both.
        FileNotFoundError: there is no such file.
    """
    rollouts: dict[str, list[Any]] = {name: [] for name in _KNOWN}
    seen: Counter[str] = Counter()
    for file in _files(path):
        columns = _read_lines(file) if file.suffix == ".jsonl" else _read_parquet(file)
        absent = [name for name in NEEDED if name not in columns]
        if absent:
            raise ValueError(f"{file} has no column {', '.join(absent)}; rollouts need {', '.join(NEEDED)}")
        for name, values in _completed(columns, seen).items():
            rollouts[name].extend(values)
    return rollouts


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise ValueError(f"folder {path} holds no .parquet file; pass the folder that does")
        return files
    if path.suffix not in (".parquet", ".jsonl"):
        raise ValueError(f"path is {path}; pass a .parquet file, a .jsonl file or a folder of .parquet files")
    return [path]


def _completed(columns: dict[str, list[Any]], seen: Counter[str]) -> dict[str, list[Any]]:
    uids, verdicts = columns["prompt_uid"], columns["verdict"]
    positions = []
    for uid in uids:
        positions.append(seen[uid])
        seen[uid] += 1
    filled = {name: [value] * len(uids) for name, value in DEFAULTS.items()}
    rewards = [1.0 if verdict == "correct" else 0.0 for verdict in verdicts]
    return filled | {"sample": positions, "reward": rewards} | columns


def _read_parquet(file: Path) -> dict[str, list[Any]]:
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            table = parquet.read([name for name in parquet.schema_arrow.names if name in _KNOWN])
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{file} is not a readable Parquet file: {error}; export it again") from error
    return {name: to_values(table[name]) for name in table.column_names}


def _read_lines(file: Path) -> dict[str, list[Any]]:
    rows = list(_rows(file))
    names = [name for name in _KNOWN if any(name in row for _, row in rows)]
    columns: dict[str, list[Any]] = {name: [] for name in names}
    for number, row in rows:
        absent = [name for name in names if name not in row]
        if absent:
            raise ValueError(f"{file}, line {number} has no {', '.join(absent)}, which other lines have; add it")
        for name in names:
            columns[name].append(row[name])
    return columns


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except ValueError as error:
                raise ValueError(f"{file}, line {number} is not JSON: {error}; export it again") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number} is not a JSON object; write one rollout a line")
            yield number, row
