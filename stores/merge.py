"""Merging: what one store has and another lacks is copied, artifact by artifact, files before the entry.

A key is the digest of all that its artifact depends on, so equal keys are equal things: what both have is compared and
not counted twice. A merge that is cut short goes on when it is repeated.
"""

from dataclasses import dataclass
from pathlib import Path

from stores.entries import Count, differences
from stores.errors import Conflict
from stores.store import Store


@dataclass(frozen=True)
class Merged:
    """How many artifacts were copied, and how many were there already."""

    copied: int
    present: int


def merge(target: Store, source: Store) -> Merged:
    """Copy every artifact of a store into another, with its files, its belief counts and where it came from.

    Args:
        target: What is added to.
        source: What is read.

    Raises:
        Conflict: both have a key with different content; nothing is copied.
        Damaged: a file of the source is not what was stored; what was copied before it stays.
    """
    keys = source.catalog.keys()
    present = {key: artifact for key in keys if (artifact := target.catalog.get(key, retired=True))}
    new = [key for key in keys if key not in present or not target.done(key)]
    for key, artifact in present.items():
        found = differences(artifact, source.get(key))
        if found or _counts(target, key) != _counts(source, key):
            what = ", ".join(found or ["counts"])
            raise Conflict(f"key {key} differs between {target.root} and {source.root}: {what}; keep the two apart")
    for key in new:
        artifact = source.get(key)
        files: dict[str, Path] = {name: source.objects.path(file) for name, file in artifact.files.items()}
        stored = {name: target.objects.put_file(path) for name, path in files.items()}
        assert stored == artifact.files, "a verified file has its digest"
        target.commit(artifact, _counts(source, key))
    return Merged(len(new), len(keys) - len(new))


def _counts(store: Store, key: str) -> list[Count]:
    return [(uid, successes, failures) for _, uid, successes, failures in store.catalog.counts([key])]
