"""What leaves: a dataset folder that trainers read. What comes in: rollouts made elsewhere (`read_rollouts`).

A bundle holds `data/stage_NN/train.parquet` and `control/stage_NN/train.parquet`, all with one schema,
`selection.parquet` without any text, a card with a dataset configuration a stage, and, written last, `manifest.json`
with the SHA-256 of every file.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from stores import disk
from stores.canonical import canonical
from stores.disk import remedied, write_file
from stores.parquet import Columns, encode, to_table
from stores.rollout_files import read_rollouts

__all__ = ["SCHEMA", "WITH_IMAGES", "read_rollouts", "write_bundle"]

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA: dict[str, pa.DataType] = {
    "prompt_uid": pa.string(),
    "prompt": _MESSAGES,
    "solution": pa.string(),
    "ground_truth": pa.string(),
    "data_source": pa.string(),
    "ability": pa.string(),
    "reward_spec": pa.string(),
    "stage": pa.int32(),
    "rank": pa.int32(),
    "score_influence": pa.float64(),
    "score_wmi": pa.float64(),
    "weight": pa.float64(),
    "pass_rate": pa.float64(),
    "alpha": pa.float64(),
    "beta": pa.float64(),
    "n_obs": pa.int64(),
    "ess": pa.float64(),
    "log_ratio_p99": pa.float64(),
    "policy_id": pa.string(),
}
"""The columns of a stage. The float64 columns may hold None, or be absent: then all of them are None."""
IMAGES = "images"
_PART = pa.struct([("type", pa.string()), ("text", pa.string())])
WITH_IMAGES: dict[str, pa.DataType] = SCHEMA | {
    "prompt": pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(_PART))])),
    IMAGES: pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
}
"""The same where prompts have images: every content is a list of parts, and the images stand in order beside them, as
`datasets` stores them. A bundle has this schema in all its stages and controls, or in none."""
_TEXTS = {"prompt", "messages", "question", "solution", "ground_truth", "answer", "text", "completion"}


def write_bundle(
    folder: Path,
    stages: Sequence[Columns],
    controls: Sequence[Columns],
    selection: Columns,
    manifest: dict[str, Any],
    card: str,
) -> None:
    """Write a dataset bundle beside its place and put it there whole, replacing the bundle that was there.

    Args:
        folder: Where the bundle shall be; absent, empty, or a bundle.
        stages: The columns of `SCHEMA`, a mapping a stage, or those of `WITH_IMAGES`; `prompt` holds lists of messages
            with role and content, `reward_spec` JSON text.
        controls: The same for random subsets of equal size; may be empty.
        selection: Every prompt with scores and reason, without text.
        manifest: JSON-able facts; `files` is added: SHA-256, size and rows by path.
        card: Markdown, put after the header that names the configurations.

    Raises:
        ValueError: a column that is missing, unknown or does not fit; text in the selection; a folder that is none of
            ours.
        OSError: the disk refused; the bundle that was there is still there, unless only the last sync failed.
    """
    _check(folder, stages, selection, manifest)
    schema = WITH_IMAGES if any(IMAGES in columns for columns in (*stages, *controls)) else SCHEMA
    files = {"selection.parquet": to_table(selection)}
    for kind, subsets in (("data", stages), ("control", controls)):
        for number, columns in enumerate(subsets):
            files[_path(kind, number)] = _stage_table(columns, f"{kind} stage {number}", schema)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        _write_all(temporary, files, _header(len(stages), len(controls)) + card, manifest)
        with remedied(folder):
            _replace(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(folder: Path, stages: Sequence[Columns], selection: Columns, manifest: dict[str, Any]) -> None:
    if not stages:
        raise ValueError("stages is empty; a bundle has at least one stage")
    texts = sorted(_TEXTS & selection.keys())
    if texts:
        raise ValueError(f"selection has the text columns {texts}; leave them out: prompt_uid names the prompt")
    if "files" in manifest:
        raise ValueError("manifest has an entry 'files', which write_bundle adds; name yours otherwise")
    canonical(manifest, "manifest")
    if folder.exists() and not (folder / "manifest.json").exists() and any(folder.iterdir()):
        raise ValueError(f"folder {folder} holds files that are no bundle; name another folder or empty it")


def _stage_table(columns: Columns, name: str, schema: Mapping[str, pa.DataType]) -> pa.Table:
    rows = len(next(iter(columns.values()), ()))
    optional = {column: [None] * rows for column, kind in schema.items() if pa.types.is_floating(kind)}
    given = {**optional, **columns}
    absent = [column for column in schema if column not in given]
    unknown = [column for column in given if column not in schema]
    if absent or unknown:
        raise ValueError(f"{name} lacks {absent} and has the unknown {unknown}; its columns are {list(schema)}")
    table = to_table({column: given[column] for column in schema}, schema)
    for column in schema:
        if column not in optional and table[column].null_count:
            raise ValueError(f"{name} has None in {column!r}; give every row a value")
    return table


def _path(kind: str, number: int) -> str:
    return f"{kind}/stage_{number:02d}/train.parquet"


def _header(stages: int, controls: int) -> str:
    """The YAML that tells `datasets.load_dataset` which files a configuration has."""
    lines = ["---", "configs:"]
    for kind, name, count in (("data", "stage", stages), ("control", "control", controls)):
        for number in range(count):
            lines += [f"- config_name: {name}_{number:02d}", f"  data_files: {_path(kind, number)}"]
            if (name, number) == ("stage", 0):
                lines.append("  default: true")
    return "\n".join([*lines, "---", "", ""])


def _write_all(folder: Path, tables: Mapping[str, pa.Table], card: str, manifest: dict[str, Any]) -> None:
    entries = {}
    contents = {"README.md": card.encode()} | {name: encode(table) for name, table in tables.items()}
    for name, data in sorted(contents.items()):
        _write(folder / name, data)
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        entries[name] = entry | ({"rows": tables[name].num_rows} if name in tables else {})
    text = json.dumps(manifest | {"files": entries}, indent=2, sort_keys=True)
    _write(folder / "manifest.json", f"{text}\n".encode())
    with remedied(folder):
        for inside, _, _ in os.walk(folder):
            disk.sync_folder(Path(inside))


def _write(path: Path, data: bytes) -> None:
    with remedied(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, data, mode=0o644)


def _replace(folder: Path, temporary: Path) -> None:
    """Put the temporary in the folder's place; the old folder comes back when that fails.

    A folder cannot be replaced in one step: a crash between the two renames leaves the old one as `.<name>.<hex>.old`.
    """
    old = temporary.with_name(f"{temporary.name}.old")
    if folder.exists():
        disk.rename(folder, old)
    try:
        disk.rename(temporary, folder)
    except OSError:
        if old.exists():
            with suppress(OSError):
                disk.rename(old, folder)
        raise
    try:
        disk.sync_folder(folder.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)
