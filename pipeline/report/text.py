"""Text and numbers as the page shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def clean(value: Any) -> Any:
    """Return a copy of nested facts that is safe to lay out: visible text, finite numbers or None, plain containers."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if hasattr(value, "tolist"):  # arrays and their scalars
        return clean(value.tolist())
    raise TypeError(f"a report has text, numbers, lists and mappings; got {type(value).__name__}")


def visible(text: str) -> str:
    """Return ``text`` with every character that does not print, or that turns others around, replaced by a sign."""
    return text if text.isprintable() else "".join(map(_sign, text))


def number(value: float | None, places: int = 3) -> str:
    """Return a number with a fixed count of decimals."""
    return MISSING if value is None else f"{value:.{places}f}".replace("-", MINUS)


def signed(value: float | None, places: int = 3) -> str:
    """Return a number that always has its sign."""
    return MISSING if value is None else f"{value:+.{places}f}".replace("-", MINUS)


def count(value: float | None) -> str:
    """Return a count with thousands separated."""
    return MISSING if value is None else f"{round(value):,}"


def excerpt(text: str | None, most: int) -> str:
    """Return the start of a text, saying how much is left out."""
    if text is None:
        return MISSING
    return text if len(text) <= most else f"{text[:most]} … ({len(text) - most:,} more characters)"


def label(text: str, most: int = 20) -> str:
    """Return a name on one line, short enough for a picture."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _sign(character: str) -> str:
    shown = character in "\n\t" or character.isprintable()
    return character if shown else f"\u2039U+{ord(character):04X}\u203a"
