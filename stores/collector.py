"""The collector: removes what nothing refers to and nobody is about to refer to.

Kept are the objects that an artifact references, those put within the grace period, and those put since the oldest
lease that is held now was taken: a writer with a lease may take as long as it likes from its first object to its
commit. A retired artifact is removed, with the files that nothing else references, once it has been retired for the
grace period and nobody leases its key. Commits wait while objects are deleted, some at a time, and see afterwards what
is gone; readers do not wait, and a file that is mapped stays readable. Groups that wait for the rest of their shard
are left alone while anybody holds a lease.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from stores import disk
from stores.remote import RemoteObjects
from stores.store import Store

DAY = 86400.0
_ROUND = 200  # objects that are deleted while commits wait
_SKEW = 60.0  # seconds that the clock of a bucket, in whole seconds, may be behind the one that dates leases


@dataclass(frozen=True)
class Collected:
    """What was removed: objects, and local temporaries, copies, and groups whose shard nobody went on with."""

    objects: int
    temporaries: int


def orphans(store: Store) -> list[str]:
    """Digests of the objects that no artifact references, sorted: steps cut short leave them."""
    referenced = {file.digest for _, _, file in store.catalog.files()}
    return sorted(digest for digest, _ in store.objects.listing() if digest not in referenced)


def collect(store: Store, grace_seconds: float = DAY) -> Collected:
    """Delete retired artifacts, orphans and what waits that are older than the grace period and than every lease.

    Args:
        store: What to clean.
        grace_seconds: Longer than any step without a lease takes from its first object to its commit.

    Raises:
        ValueError: a negative period.
    """
    if grace_seconds < 0:
        raise ValueError(f"grace_seconds = {grace_seconds}: give a period of 0 seconds or more")
    began, oldest = time.time(), store.leases.oldest()
    limit = began - grace_seconds if oldest is None else min(began - grace_seconds, oldest - _SKEW)
    for key in store.catalog.remove_retired(began - grace_seconds):
        shutil.rmtree(store.root / "checkpoints" / key, ignore_errors=True)
    old = [digest for digest, put in store.objects.listing() if put <= limit]
    deleted = sum(_delete(store, old[start : start + _ROUND]) for start in range(0, len(old), _ROUND))
    waiting = [store.objects.temporaries] + ([store.spool.folder] if oldest is None else [])
    temporaries = sum(_delete_old(path, limit) for folder in waiting if folder.is_dir() for path in folder.iterdir())
    return Collected(deleted, temporaries + _trim_cache(store, limit))


def _delete(store: Store, digests: list[str]) -> int:
    """Delete those that nothing references, while commits wait; a commit that comes later sees that they are gone."""
    with store.catalog.exclusive() as referenced:
        loose = [digest for digest in digests if digest not in referenced]
        for digest in loose:
            store.objects.delete(digest)
    return len(loose)


def _trim_cache(store: Store, limit: float) -> int:
    """Remove local copies of objects that are not in the bucket's catalog any more."""
    if not isinstance(store.objects, RemoteObjects):
        return 0
    referenced = {file.digest for _, _, file in store.catalog.files()}
    old = [digest for digest, made in store.objects.cached() if made <= limit and digest not in referenced]
    for digest in old:
        store.objects.drop_copy(digest)
    return len(old)


def _delete_old(path: Path, limit: float) -> bool:
    try:
        if path.stat().st_mtime > limit:
            return False
        with disk.remedied(path):
            shutil.rmtree(path) if path.is_dir() else disk.unlink(path)
    except FileNotFoundError:  # a temporary that got its final name, or another collector's work
        return False
    return True
