"""Rows of other people's data sets as ``Prompts``: which column means what, and what makes a row unusable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.messages import read_messages
from pipeline.records import Prompts, canonical, prompt_uid

Row = Mapping[str, Any]

GROUND_TRUTHS = ("ground_truth", "solution", "answer", "reward_model.ground_truth", "reward_spec.ground_truth")
"""Where a ground truth is looked for, in this order."""

VERIFIER_COLUMNS = ("verifier", "reward_spec")


@dataclass(frozen=True)
class Names:
    """The columns to read; None where a row has no such column and a default stands in."""

    prompt: str
    ground_truth: str
    data_source: str | None
    ability: str | None
    images: str | None


def rows_to_prompts(rows: Sequence[Row], source: Row) -> Prompts:
    """Return rows as prompts, in order; their own ``prompt_uid`` column, if any, is ignored.

    Args:
        rows: the rows, as mappings of column names to values.
        source: how to read them; see ``pipeline.prompts.load_prompts``.

    Raises:
        ValueError: there are no rows, a column is missing, or a row lacks a prompt or a ground truth.
    """
    if not rows:
        raise ValueError(f"there are no prompts in {str(source['path'])!r}; check the file, or config and split")
    names = _names(rows, source)
    records = [_record(row, names, source, f"row {i} of {str(source['path'])!r}") for i, row in enumerate(rows)]
    return Prompts(*zip(*records, strict=True))


def _names(rows: Sequence[Row], source: Row) -> Names:
    """Return which columns to read, or raise ValueError with those that are wanted and those that are there."""
    there = dict.fromkeys(key for row in rows for key in row)
    there |= dict.fromkeys(
        f"{key}.{inner}" for key, value in rows[0].items() if isinstance(value, dict) for inner in value
    )
    prompt = str(source.get("prompt", "prompt"))
    truth = source.get("ground_truth") or next((name for name in GROUND_TRUTHS if name in there), None)
    ability = source.get("ability") or ("ability" if "ability" in there else None)
    images = source.get("images", "images" if "images" in there else None)
    missing = [name for name in (prompt, truth, ability, images) if name is not None and name not in there]
    missing += [] if truth else [f"one of {list(GROUND_TRUTHS)}"]
    if missing:
        raise ValueError(
            f"{str(source['path'])!r} lacks column(s) {', '.join(missing)}; it has {list(there)}; "
            "set prompt, ground_truth, ability or images of the source to one of these"
        )
    named = str(source.get("data_source", "data_source"))
    return Names(prompt, str(truth), named if named in there else None, ability, images)


def _record(row: Row, names: Names, source: Row, where: str) -> tuple[str, ...]:
    """Return one row as the fields of ``Prompts``, in order."""
    images = _get(row, names.images) if names.images else None
    beside = [] if images is None else images if isinstance(images, list) else [images]
    path = Path(str(source["path"]))
    folder = path if path.is_dir() else path.parent
    messages = canonical(read_messages(_get(row, names.prompt), beside, source.get("template"), where, folder))
    truth = _text(_get(row, names.ground_truth), names.ground_truth, where)
    name = str(source.get("data_source", Path(str(source["path"])).stem))
    if names.data_source:
        name = _text(_get(row, names.data_source), names.data_source, where)
    ability = _text(_get(row, names.ability), names.ability, where) if names.ability else name
    return prompt_uid(messages, truth, name), messages, truth, name, ability, _verifier(row, source, where)


def _get(row: Row, name: str) -> Any:
    """Return a column of a row; ``a.b`` is the field b of the struct a; None if it is not there."""
    if name in row or "." not in name:
        return row.get(name)
    outer, _, inner = name.partition(".")
    struct = row.get(outer)
    return struct.get(inner) if isinstance(struct, Mapping) else None


def _text(value: Any, name: str, where: str) -> str:
    """Return a value as text: a string as it is, anything else as canonical JSON (72 is "72")."""
    if value is None:
        raise ValueError(f"{where} has no {name}; fill it in, or leave the row out")
    try:
        return value if isinstance(value, str) else canonical(value)
    except (TypeError, ValueError) as err:
        raise ValueError(f"{where}: {name} = {value!r} cannot be written as text ({err}); store a string") from err


def _verifier(row: Row, source: Row, where: str) -> str:
    """Return the verifier of a row: its own spec if it carries one, else that of the source."""
    for column in VERIFIER_COLUMNS:
        own = row.get(column)
        if isinstance(own, str) and own.strip():
            try:
                own = json.loads(own)
            except json.JSONDecodeError as err:
                raise ValueError(f"{where}: {column} = {row[column][:200]!r} is not JSON ({err})") from err
            if not isinstance(own, dict) or "id" not in own:
                raise ValueError(f"{where}: {column} = {row[column][:200]!r} must be a JSON object with an 'id'")
        if isinstance(own, Mapping) and "id" in own:  # other structs (SkyRL's reward_spec) only carry a ground truth
            return canonical(own)
    return canonical(dict(source.get("verifier", {"id": "exact"})))
