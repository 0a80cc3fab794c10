"""Leases: who may commit under a name until when, with fencing numbers.

    fence <- fence + 1 at each change of owner; a commit with an older fence is refused

A lease is held by renewing it. Whoever dies stops renewing, and after `seconds` somebody else may take it; a holder
that only slept finds its fence outdated and commits nothing. On the machine where the holder ran, a holder whose
process is gone is seen at once, without waiting. Moments are those of the processes' clocks, so machines that share a
catalog need clocks that agree to within a fraction of `seconds`; safety rests on the fence alone.
"""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from stores import schema
from stores.database import Database
from stores.entries import Lease
from stores.errors import Fenced, StoreError


class Leases:
    """The leases in one database.

    Args:
        database: Where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def acquire(self, name: str, seconds: float, owner: str | None = None) -> Lease:
        """Take a lease that nobody holds.

        Args:
            name: What is leased: a run, or the key of an artifact that the collector shall keep.
            seconds: How long it holds unless it is renewed.
            owner: By default this process: `host:pid:start`.

        Raises:
            Fenced: somebody holds it; the message says who and until when.
        """
        if not seconds > 0:
            raise ValueError(f"seconds = {seconds}: a lease holds for some time; give a number above 0")
        owner, now = owner or this_process(), time.time()
        with self._database.transaction(write=True) as connection:
            row = _find(connection, name)
            if row is not None and row.expires_at > now and not _is_gone(row.owner):
                raise Fenced(
                    f"{name!r} is held by {row.owner} for another {row.expires_at - now:.0f} s unless it goes on "
                    "longer; wait for it to end, or end it"
                )
            lease = Lease(name, owner, 1 if row is None else row.fence + 1, now, now + seconds)
            _write(connection, lease, new=row is None)
        return lease

    def renew(self, lease: Lease, seconds: float) -> Lease:
        """Hold a lease for longer; also one that has expired, as long as nobody has taken it.

        Raises:
            Fenced: somebody has.
        """
        with self._database.transaction(write=True) as connection:
            check_fence(connection, lease)
            renewed = replace(lease, expires_at=time.time() + seconds)
            _write(connection, renewed, new=False)
        return renewed

    def release(self, lease: Lease) -> None:
        """Give a lease back, where it is still held; the fence stays."""
        with self._database.transaction(write=True) as connection:
            row = _find(connection, lease.name)
            if row is not None and row.fence == lease.fence:
                _write(connection, replace(lease, expires_at=0.0), new=False)

    @contextmanager
    def hold(self, name: str, seconds: float = 60.0, *, patience: float = 0.0) -> Iterator[Lease]:
        """Hold a lease while the block runs, renewed from a thread in the background.

        A lease that somebody holds is watched until it expires, or is seen to be renewed, or is given back within
        `patience` seconds.

        Raises:
            Fenced: somebody holds it, and goes on.
        """
        lease, done = self._await(name, seconds, time.monotonic() + patience), threading.Event()

        def renew() -> None:
            while not done.wait(seconds / 3):
                try:
                    self.renew(lease, seconds)
                except Fenced:  # the next commit says so
                    return
                except StoreError:  # an outage: the lease may expire, and be renewed when the database is back
                    continue

        thread = threading.Thread(target=renew, name=f"lease {name}", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            done.set()
            thread.join()
            self.release(lease)

    def _await(self, name: str, seconds: float, until: float) -> Lease:
        seen = self._expiry(name)
        while True:
            try:
                return self.acquire(name, seconds)
            except Fenced:
                patient, expiry = time.monotonic() < until, self._expiry(name)
                if expiry != seen and not patient:  # it was renewed: the holder goes on
                    raise
                seen = expiry
                time.sleep(min(1.0 if patient else 0.25, seconds / 20))

    def _expiry(self, name: str) -> float:
        with self._database.transaction() as connection:
            row = _find(connection, name)
        return 0.0 if row is None else float(row.expires_at)

    def oldest(self) -> float | None:
        """When the oldest lease that is held now was taken (seconds since 1970); None where none is held."""
        query = sql.select(sql.func.min(schema.leases.c.acquired_at)).where(schema.leases.c.expires_at > time.time())
        with self._database.transaction() as connection:
            return connection.execute(query).scalar_one()


def check_fence(connection: sql.Connection, lease: Lease) -> None:
    """Raise Fenced unless the lease is still its owner's."""
    row = _find(connection, lease.name)
    if row is None or row.fence != lease.fence:
        holder = "nobody" if row is None else row.owner
        raise Fenced(
            f"lease {lease.name!r} of {lease.owner} was taken over by {holder}; nothing is committed: end this "
            "process, the other one goes on"
        )


@cache
def _this_machine() -> str:
    """The name of this machine, and what tells apart its boots, and containers of one name."""
    parts = socket.gethostname().replace(":", "-"), _read("/proc/sys/kernel/random/boot_id"), _namespace()
    return f"{parts[0]}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"


def _namespace() -> int:
    namespace = Path("/proc/self/ns/pid")
    return namespace.stat().st_ino if namespace.exists() else 0


def _read(path: str) -> str:
    return Path(path).read_text().strip() if Path(path).exists() else ""


def this_process() -> str:
    """The name of this process among all that were ever started: `host:pid:start`."""
    return f"{_this_machine()}:{os.getpid()}:{_started(os.getpid()) or 0}"


def _started(pid: int) -> int | None:
    """When a process started, in ticks since boot (Linux); None where it has ended, or there is no way to see it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # dead, and perhaps not buried


def _is_gone(owner: str) -> bool:
    """Whether a process ran on this machine and runs no more."""
    host, _, rest = owner.partition(":")
    pid, _, start = rest.partition(":")
    if host != _this_machine() or not Path("/proc/self/stat").exists() or not pid.isdigit():
        return False
    started = _started(int(pid))
    if started is None and not Path(f"/proc/{pid}").exists():
        try:
            os.kill(int(pid), 0)  # there may be processes that /proc does not show
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
    return str(started) != start


def _find(connection: sql.Connection, name: str) -> Any:
    return connection.execute(sql.select(schema.leases).where(schema.leases.c.name == name)).first()


def _write(connection: sql.Connection, lease: Lease, new: bool) -> None:
    row = {name: getattr(lease, name) for name in Lease.__dataclass_fields__}
    table = schema.leases
    connection.execute(
        table.insert().values(row) if new else table.update().where(table.c.name == lease.name).values(row)
    )
