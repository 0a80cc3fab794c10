"""Seals: digests by which the catalog notices that a row of it is not what was committed.

A database notices torn writes, but not every flipped bit of a page. An entry carries the SHA-256 of its columns and
files, and one of its belief counts; both are compared whenever they are read.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from stores.canonical import canonical

COLUMNS = ("key", "number", "kind", "meta", "created_at", "identity", "origin", "counts", "retired_at")
"""The columns of an artifact that its seal covers."""


def of_entry(row: Mapping[str, Any], files: Iterable[tuple[str, str, int]], inputs: Iterable[str]) -> str:
    """The seal of an artifact: of its columns, as in `COLUMNS`, its files (name, digest, size) and its inputs."""
    return of_text(canonical([[row[name] for name in COLUMNS], sorted(files), sorted(inputs)]))


def of_counts(counts: Iterable[tuple[str, int, int]]) -> str:
    """The seal of belief counts (prompt_uid, successes, failures) in their order."""
    return of_text("".join(f"{len(uid)}:{uid}{successes},{failures};" for uid, successes, failures in counts))


def match(seal: str, counts: Iterable[tuple[str, int, int]]) -> bool:
    """Whether belief counts are those that were sealed."""
    try:
        return of_counts(counts) == seal
    except TypeError:  # a value of another type
        return False


def of_text(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
