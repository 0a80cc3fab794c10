"""Canonical JSON: one spelling for each value, so that equal values have equal digests."""

import json
import math
from collections.abc import Mapping
from typing import Any


def canonical(value: Any, name: str = "value") -> str:
    """Spell a value as JSON with sorted keys, no spaces and ASCII only.

    Args:
        value: None, bool, int, finite float, str, and lists, tuples and string-keyed mappings of them.
        name: What to call the value in an error.

    Returns:
        The JSON text. Tuples are spelled as lists.

    Raises:
        ValueError: an entry has no JSON spelling; the message names the entry.
    """
    return json.dumps(_plain(value, name), sort_keys=True, separators=(",", ":"), allow_nan=False)


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
