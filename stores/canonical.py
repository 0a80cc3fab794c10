"""Canonical JSON: one spelling for each value, so that equal values have equal digests."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_ROWS = 1 << 16  # pairs joined at a time
_ESCAPED = r"[^ !#-\[\]-~]"  # what JSON spells otherwise than it is


@dataclass(frozen=True)
class Spelled:
    """A value by its canonical text, for one too large to be made of Python objects; it names no keys."""

    text: str


def canonical(value: Any, name: str = "value") -> str:
    """Spell a value as JSON with sorted keys, no spaces and ASCII only.

    Args:
        value: None, bool, int, finite float, str, and lists, tuples and string-keyed mappings of them; or `Spelled`.
        name: What to call the value in an error.

    Returns:
        The JSON text. Tuples are spelled as lists.

    Raises:
        ValueError: an entry has no JSON spelling; the message names the entry.
    """
    if isinstance(value, Spelled):
        return value.text
    return json.dumps(_plain(value, name), sort_keys=True, separators=(",", ":"), allow_nan=False)


def spell_pairs(first: pa.Array, second: pa.Array) -> Spelled:
    """Spell the list of pairs of two columns of strings, in their order.

    >>> spell_pairs(pa.array(["a", "b"]), pa.array(["x", "y"])).text
    '[["a","x"],["b","y"]]'
    """
    parts = []
    for start in range(0, len(first), _ROWS):
        block = [column.slice(start, _ROWS) for column in (first, second)]
        if any(pc.any(pc.match_substring_regex(column, _ESCAPED)).as_py() for column in block):
            pairs = zip(*(column.to_pylist() for column in block), strict=True)
            parts.append(canonical([list(pair) for pair in pairs])[1:-1])
        else:
            parts.append(",".join(pc.binary_join_element_wise('["', block[0], '","', block[1], '"]', "").to_pylist()))
    return Spelled(f"[{','.join(parts)}]")


def _plain(value: Any, name: str) -> Any:
    if value is None or type(value) in (bool, int):
        return value
    if isinstance(value, str):
        return str(value)
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_text(key, name): _plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    raise ValueError(
        f"{name} is {value!r} of type {type(value).__name__}, which has no JSON spelling; "
        "pass None, bool, int, a finite float, str, or lists and string-keyed dicts of them"
    )


def _text(key: Any, name: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{name} has the key {key!r}, which is not a string; JSON keys are strings")
    return str(key)
