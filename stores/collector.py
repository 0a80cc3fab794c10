"""The collector: removes what nothing refers to and nobody is about to refer to.

Kept are the objects that an artifact references, those put within the grace period, and those put since the oldest
lease that is held now was taken: a writer with a lease may take as long as it likes from its first object to its
commit. A retired artifact is removed, with the files that nothing else references, once it has been retired for the
grace period and nobody leases its key. Commits wait meanwhile, readers do not; a file that is mapped stays readable.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from stores import disk
from stores.remote import RemoteObjects
from stores.store import Store

DAY = 86400.0
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
    with store.catalog.exclusive(retired_before=began - grace_seconds) as referenced:
        old = [digest for digest, put in store.objects.listing() if put <= limit and digest not in referenced]
        for digest in old:
            store.objects.delete(digest)
        waiting = [store.objects.temporaries, store.spool.folder]
        temporaries = sum(_delete_old(path, limit) for folder in waiting if folder.is_dir() for path in folder.iterdir())
    return Collected(len(old), temporaries + _trim_cache(store, limit, referenced))


def _trim_cache(store: Store, limit: float, referenced: set[str]) -> int:
    """Remove local copies of objects that are not in the bucket's catalog any more."""
    if not isinstance(store.objects, RemoteObjects):
        return 0
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
