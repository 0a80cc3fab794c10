"""What an entry of the catalog is, and which entries it accepts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from stores.canonical import canonical
from stores.objects import File

Count = tuple[str, int, int]
"""prompt_uid, successes, failures."""

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")


class Key(str):
    """The key of an artifact, with the identity that it is the digest of; elsewhere it is a plain string.

    Args:
        text: The key.
        identity: JSON-able values by name.
    """

    __slots__ = ("identity",)
    identity: Mapping[str, Any]

    def __new__(cls, text: str, identity: Mapping[str, Any]) -> "Key":
        """Make a string that knows what it was made from."""
        key = super().__new__(cls, text)
        key.identity = identity
        return key

    def __getnewargs__(self) -> tuple[str, Mapping[str, Any]]:  # type: ignore[override]
        """What a copy is made from."""
        return str(self), self.identity


@dataclass(frozen=True)
class Artifact:
    """What a step made: its key, its kind, JSON-able facts about it, and its files by name.

    Attributes:
        identity: All that the key is the digest of, long entries by their SHA-256; None where it is not known.
        inputs: The keys of other artifacts among it; the catalog finds them.
        origin: Code version and settings of the process that committed it first.
        created_at: When it was committed: ISO 8601, UTC.
    """

    key: str
    kind: str
    meta: dict[str, Any]
    files: dict[str, File]
    identity: Mapping[str, Any] | None = field(default=None, compare=False)
    inputs: tuple[str, ...] = field(default=(), compare=False)
    origin: Mapping[str, str] = field(default_factory=dict, compare=False)
    created_at: str = field(default="", compare=False)


@dataclass(frozen=True)
class Lease:
    """The right to commit under a name, until somebody else takes it.

    Attributes:
        name: What is leased.
        owner: Who holds it: `host:pid:start`.
        fence: One more at each change of owner: a commit with an older one is refused.
        acquired_at: Seconds since 1970.
        expires_at: Seconds since 1970; from then on others may take it.
    """

    name: str
    owner: str
    fence: int
    acquired_at: float
    expires_at: float


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
        if not all(type(count) is int and 0 <= count < 2**31 for count in (successes, failures)):
            raise ValueError(
                f"counts of prompt {uid!r} are {(successes, failures)!r}; give whole numbers from 0 to 2^31 - 1"
            )
        seen.add(uid)


def differences(stored: Artifact, offered: Artifact) -> list[str]:
    """Name what two artifacts of one key differ in: the kind, entries of meta, files.

    What a clock measured (`seconds`, `seconds_...`, at any depth of meta) is no difference: the same work done twice
    is the same artifact.
    """
    found = [] if stored.kind == offered.kind else [f"kind ({stored.kind!r}, not {offered.kind!r})"]
    for name in sorted(stored.meta.keys() | offered.meta.keys()):
        if _spelled(stored.meta, name) != _spelled(offered.meta, name):
            found.append(f"meta[{name!r}]")
    for name in sorted(stored.files.keys() | offered.files.keys()):
        if stored.files.get(name) != offered.files.get(name):
            found.append(f"file {name!r}")
    return found


def _spelled(meta: dict[str, Any], name: str) -> str | None:
    return canonical(_timeless(meta[name])) if name in meta and not _is_clocked(name) else None


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _timeless(item) for name, item in value.items() if not _is_clocked(name)}
    return [_timeless(item) for item in value] if isinstance(value, list | tuple) else value


def _is_clocked(name: Any) -> bool:
    return name == "seconds" or str(name).startswith("seconds_")
