"""Databases that a catalog can be in: SQLite in a local file, Postgres by URL, with the same statements.

Writers take turns on both: SQLite's write lock, and an advisory lock on Postgres. A write transaction is durable when
it has ended: SQLite runs in WAL mode with full synchronisation, Postgres as its server is set (`fsync` and
`synchronous_commit` are on unless somebody switched them off).
"""

import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import ArgumentError, DatabaseError, DataError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import NullPool

from stores import schema
from stores.errors import Damaged, StoreError, Unreachable

_LOCK = 0x1F1E37  # names the advisory lock by which writers take turns on Postgres
_PRAGMAS = ("busy_timeout=60000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")
_NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "afs",
    "ceph",
    "fuse.sshfs",
    "fuse.glusterfs",
    "lustre",
    "gpfs",
    "beegfs",
}


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite catalog in a local file."""
    return sql.URL.create("sqlite", database=str(path)).render_as_string()


class Database:
    """One database with the catalog's tables.

    Args:
        url: A SQLAlchemy URL, `sqlite:///path` or `postgresql+psycopg://...`; the tables are made when absent, and
            brought to the newest schema when older.

    Raises:
        StoreError: the database cannot be reached, or was written by a newer version.
        Damaged: the file is not a database, or is one with errors.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self.name = self._engine.url.render_as_string(hide_password=True)
        if self._found_version() < schema.VERSION:
            self._migrate()

    @contextmanager
    def transaction(self, write: bool = False) -> Iterator[sql.Connection]:
        """A transaction that commits when the block ends; a writing one excludes other writers from its begin on.

        Raises:
            StoreError: the database cannot do it now.
            Damaged: the database is broken.
        """
        options: dict[str, Any] = {"influent_write": write}
        postgres = self._engine.dialect.name == "postgresql"
        if postgres:  # a writer that waited for its turn must see what was committed meanwhile; a reader sees one state
            options["isolation_level"] = "READ COMMITTED" if write else "REPEATABLE READ"
        try:
            with self._engine.execution_options(**options).begin() as connection:
                if postgres and write:
                    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_LOCK)))
                yield connection
        except DataError as error:
            raise ValueError(f"catalog {self.name} cannot hold a value: {error.orig}; change it") from error
        except (OperationalError, InterfaceError, PoolTimeoutError) as error:
            why = getattr(error, "orig", error)
            raise Unreachable(
                f"catalog {self.name}: {why}; check the disk and the database, then repeat the step: "
                "a repeated commit changes nothing"
            ) from error
        except DatabaseError as error:
            raise Damaged(f"catalog {self.name}: {error.orig}; restore it from a copy") from error

    def problems(self) -> list[str]:
        """What SQLite's own check of every page finds; Postgres checks its pages when it reads them."""
        with self.transaction() as connection:
            if connection.dialect.name != "sqlite":
                return []
            found = list(connection.scalars(sql.text("PRAGMA integrity_check")))
        return [f"catalog {self.name}: {line}" for line in found if line != "ok"]

    def _found_version(self) -> int:
        with self.transaction() as connection:
            return self._version(connection)

    def _version(self, connection: sql.Connection) -> int:
        if not sql.inspect(connection).has_table(schema.version.name):
            return 0
        version = connection.execute(sql.select(sql.func.max(schema.version.c.version))).scalar_one() or 0
        if version > schema.VERSION:
            raise StoreError(
                f"the catalog {self.name} has schema version {version}, and this version of Influent knows up to "
                f"{schema.VERSION}; upgrade Influent, or name another store"
            )
        return int(version)

    def _migrate(self) -> None:
        from stores.migrations import migrate

        with self.transaction(write=True) as connection:
            found = self._version(connection)  # another process may have been faster
            if found < schema.VERSION:
                migrate(connection, found)


def on_network(path: Path, mounts: str) -> str | None:
    """The type of the network file system that a path is on, or None.

    Args:
        path: Absolute.
        mounts: The text of `/proc/mounts`.
    """
    fields = [line.split(" ") for line in mounts.splitlines() if line.count(" ") >= 2]
    found = [(point, kind) for _, point, kind, *_ in fields if path == Path(point) or Path(point) in path.parents]
    kind = max(found, key=lambda mount: len(mount[0]), default=("", ""))[1]
    return kind if kind in _NETWORK else None


def _engine(url: str) -> sql.Engine:
    if (backend := _backend(url)) == "postgresql":
        engine = sql.create_engine(url, pool_pre_ping=True)
        os.register_at_fork(after_in_child=partial(_forget, weakref.ref(engine)))
        return engine
    assert backend == "sqlite"
    _warn_of_network(Path(sql.make_url(url).database or ""))
    # No pool: a connection costs under a millisecond, and none is ever carried across a fork.
    engine = sql.create_engine(url, poolclass=NullPool)

    @sql.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.isolation_level = None  # sqlite3 shall not begin transactions of its own
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    @sql.event.listens_for(engine, "begin")
    def begin(connection: sql.Connection) -> None:
        write = connection.get_execution_options().get("influent_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _forget(engine: "weakref.ref[sql.Engine]") -> None:
    """In the child of a fork: leave the parent's connections to the parent."""
    if (found := engine()) is not None:
        found.dispose(close=False)


def _backend(url: str) -> str:
    """The kind of database; StoreError where it is none of ours, or its driver is not installed."""
    try:
        parsed = sql.make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise ArgumentError(f"there is no catalog in {parsed.get_backend_name()}")
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, ImportError, NoSuchModuleError) as error:
        raise StoreError(
            f"catalog = {url.rpartition('@')[2]!r}: {error}; give 'postgresql+psycopg://user@host/database' and pip "
            "install 'influent[postgres]', or leave it empty for SQLite"
        ) from error
    return parsed.get_backend_name()


def _warn_of_network(path: Path) -> None:
    mounts = Path("/proc/mounts")
    kind = on_network(path.absolute(), mounts.read_text()) if mounts.exists() else None
    if kind:
        warnings.warn(
            f"the SQLite catalog {path} is on a network file system ({kind}), where its locks and its write-ahead log "
            "cannot be relied on; name a Postgres catalog by URL, or put the run directory on a local disk",
            stacklevel=2,
        )
