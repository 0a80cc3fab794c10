"""What an entry of the catalog is, and which entries it accepts."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from stores.canonical import canonical
from stores.objects import File

Count = tuple[str, int, int]
"""prompt_uid, successes, failures."""

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Artifact:
    """What a step made: its key, its kind, JSON-able facts about it, and its files by name."""

    key: str
    kind: str
    meta: dict[str, Any]
    files: dict[str, File]


def check_names(key: str, files: Iterable[str]) -> None:
    """Raise ValueError for a key or file name that could not safely be part of a path."""
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"key is {key!r}; a key has 1 to 200 letters, digits, dots, dashes and underscores and begins with a "
            "letter or digit: make it with Store.key"
        )
    for name in files:
        if not name or name != str(PurePosixPath(name)) or PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            raise ValueError(f"file name {name!r} of {key} is not a relative path without '..'; rename the file")


def check_counts(counts: Sequence[Count]) -> None:
    """Raise ValueError for a prompt counted twice, and for counts that are not whole numbers from 0 up."""
    seen: set[str] = set()
    for uid, successes, failures in counts:
        if uid in seen:
            raise ValueError(f"counts has prompt {uid!r} twice; add its successes and failures up")
        if not all(type(count) is int and count >= 0 for count in (successes, failures)):
            raise ValueError(f"counts of prompt {uid!r} are {(successes, failures)!r}; give whole numbers from 0 up")
        seen.add(uid)


def differences(stored: Artifact, offered: Artifact) -> list[str]:
    """Name what two artifacts of one key differ in: the kind, entries of meta, files."""
    found = [] if stored.kind == offered.kind else [f"kind ({stored.kind!r}, not {offered.kind!r})"]
    for name in sorted(stored.meta.keys() | offered.meta.keys()):
        if _spelled(stored.meta, name) != _spelled(offered.meta, name):
            found.append(f"meta[{name!r}]")
    for name in sorted(stored.files.keys() | offered.files.keys()):
        if stored.files.get(name) != offered.files.get(name):
            found.append(f"file {name!r}")
    return found


def _spelled(meta: dict[str, Any], name: str) -> str | None:
    return canonical(meta[name]) if name in meta else None
