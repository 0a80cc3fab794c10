"""The SQL catalog: the only commit point of a store.

An artifact is visible when its row is, together with the rows of its files and of its belief counts: one transaction.
SQLite by default; Postgres by URL, with the same statements. Writers take turns on both.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import NullPool

from stores.canonical import canonical
from stores.entries import Artifact, Count, check_counts, check_names, differences
from stores.errors import Conflict, Damaged, Missing, StoreError
from stores.objects import File

VERSION = 1
_LOCK = 0x1F1E37  # names the advisory lock by which writers take turns on Postgres
_CHUNK = 500  # keys in one IN list: every database takes that many
_PRAGMAS = ("busy_timeout=60000", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")

_tables = sql.MetaData()
_version = sql.Table("schema_version", _tables, sql.Column("version", sql.Integer, primary_key=True))
_artifacts = sql.Table(
    "artifacts",
    _tables,
    sql.Column("key", sql.Text, primary_key=True),
    sql.Column("number", sql.Integer, nullable=False, unique=True),  # the order of commits
    sql.Column("kind", sql.Text, nullable=False),
    sql.Column("meta", sql.Text, nullable=False),
    sql.Column("created_at", sql.Text, nullable=False),
)
_files = sql.Table(
    "files",
    _tables,
    sql.Column("artifact", sql.ForeignKey("artifacts.key"), primary_key=True),
    sql.Column("name", sql.Text, primary_key=True),
    sql.Column("digest", sql.Text, nullable=False),
    sql.Column("size", sql.BigInteger, nullable=False),
)
_counts = sql.Table(
    "counts",
    _tables,
    sql.Column("batch", sql.ForeignKey("artifacts.key"), primary_key=True),
    sql.Column("prompt_uid", sql.Text, primary_key=True),
    sql.Column("position", sql.Integer, nullable=False),
    sql.Column("successes", sql.Integer, nullable=False),
    sql.Column("failures", sql.Integer, nullable=False),
)


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite catalog in a local file."""
    return sql.URL.create("sqlite", database=str(path)).render_as_string()


class Catalog:
    """Artifacts and belief counts in one database.

    Args:
        url: A SQLAlchemy URL, `sqlite:///path` or `postgresql+driver://...`; the tables are made when absent.

    Raises:
        StoreError: the database cannot be reached, or was written by a newer version.
        Damaged: the file is not a database, or is one with errors.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self.name = self._engine.url.render_as_string(hide_password=True)
        if not self._found_version():
            self._make_tables()

    def get(self, key: str) -> Artifact | None:
        """The artifact of a key, or None."""
        with self._transaction() as connection:
            return _read(connection, key)

    def commit(self, artifact: Artifact, counts: Sequence[Count] = ()) -> Artifact:
        """Make an artifact visible, with its files and belief counts, in one transaction.

        Args:
            artifact: What to commit; its files must be durable already.
            counts: (prompt_uid, successes, failures), a prompt at most once, in the order to keep.

        Returns:
            The stored artifact. The same key with the same content is a no-op.

        Raises:
            Conflict: the key is taken by other content; the message says what differs.
            ValueError: an unusable key or file name, meta without JSON spelling, or counts that do not count.
        """
        check_names(artifact.key, artifact.files)
        check_counts(counts)
        meta = canonical(artifact.meta, "meta")
        with self._transaction(write=True) as connection:
            stored = _read(connection, artifact.key)
            if stored is None:
                _insert(connection, artifact, meta, counts)
                return Artifact(artifact.key, artifact.kind, json.loads(meta), dict(artifact.files))
            found = differences(stored, artifact)
            if _read_counts(connection, [artifact.key]) != [(artifact.key, *count) for count in counts]:
                found.append("counts")
            if found:
                raise Conflict(
                    f"key {artifact.key} is in the catalog {self.name} with another {', another '.join(found)}; "
                    "put whatever differs into the identity that the key is made of"
                )
            return stored

    def keys(self, kind: str | None = None) -> list[str]:
        """The keys of a kind, or of all kinds, in the order of their commits."""
        query = sql.select(_artifacts.c.key).order_by(_artifacts.c.number)
        if kind is not None:
            query = query.where(_artifacts.c.kind == kind)
        with self._transaction() as connection:
            return list(connection.scalars(query))

    def counts(self, batches: Sequence[str]) -> list[tuple[str, str, int, int]]:
        """The counts (batch, prompt_uid, successes, failures) of some batches.

        Args:
            batches: Keys of artifacts; one listed twice is read once, at its first place.

        Returns:
            Rows in the order of `batches`, and within a batch in the order of its commit.

        Raises:
            Missing: a batch is not in the catalog.
        """
        unique = list(dict.fromkeys(batches))
        with self._transaction() as connection:
            for chunk in _chunks(unique):
                known = set(connection.scalars(sql.select(_artifacts.c.key).where(_artifacts.c.key.in_(chunk))))
                for batch in chunk:
                    if batch not in known:
                        raise Missing(f"batch {batch!r} is not in the catalog {self.name}; commit it first")
            return _read_counts(connection, unique)

    def files(self) -> list[tuple[str, str, File]]:
        """Every (artifact key, file name, file), artifacts in the order of their commits, files by name."""
        with self._transaction() as connection:
            return _read_files(connection)

    @contextmanager
    def exclusive(self) -> Iterator[set[str]]:
        """Hold all commits back; gives the digests that some artifact references."""
        with self._transaction(write=True) as connection:
            yield {file.digest for _, _, file in _read_files(connection)}

    def _found_version(self) -> bool:
        with self._transaction() as connection:
            if not sql.inspect(connection).has_table(_version.name):
                return False
            version = connection.execute(sql.select(sql.func.max(_version.c.version))).scalar_one()
        if version is not None and version > VERSION:
            raise StoreError(
                f"the catalog {self.name} has schema version {version}, and this version of Influent knows up to "
                f"{VERSION}; upgrade Influent, or name another store"
            )
        return version is not None

    def _make_tables(self) -> None:
        with self._transaction(write=True) as connection:
            _tables.create_all(connection)
            if connection.execute(sql.select(_version.c.version)).first() is None:
                connection.execute(_version.insert().values(version=VERSION))

    @contextmanager
    def _transaction(self, write: bool = False) -> Iterator[sql.Connection]:
        try:
            with self._engine.execution_options(influent_write=write).begin() as connection:
                if write and connection.dialect.name == "postgresql":
                    connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_LOCK)))
                yield connection
        except OperationalError as error:
            raise StoreError(
                f"catalog {self.name}: {error.orig}; check the disk and the database, then repeat the step: "
                "a repeated commit changes nothing"
            ) from error
        except DatabaseError as error:
            raise Damaged(f"catalog {self.name}: {error.orig}; restore it from a copy") from error


def _engine(url: str) -> sql.Engine:
    if sql.make_url(url).get_backend_name() != "sqlite":
        return sql.create_engine(url, pool_pre_ping=True)
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


def _insert(connection: sql.Connection, artifact: Artifact, meta: str, counts: Sequence[Count]) -> None:
    number = connection.execute(sql.select(sql.func.coalesce(sql.func.max(_artifacts.c.number), 0) + 1)).scalar_one()
    row = {"key": artifact.key, "number": number, "kind": artifact.kind, "meta": meta}
    connection.execute(_artifacts.insert(), row | {"created_at": datetime.now(UTC).isoformat(timespec="seconds")})
    files = [(artifact.key, name, file.digest, file.size) for name, file in artifact.files.items()]
    ledger = [(artifact.key, uid, position, *count) for position, (uid, *count) in enumerate(counts)]
    for table, rows in ((_files, files), (_counts, ledger)):
        if rows:
            connection.execute(table.insert(), [dict(zip(table.c.keys(), row, strict=True)) for row in rows])


def _read(connection: sql.Connection, key: str) -> Artifact | None:
    row = connection.execute(sql.select(_artifacts.c.kind, _artifacts.c.meta).where(_artifacts.c.key == key)).first()
    if row is None:
        return None
    files = connection.execute(sql.select(_files).where(_files.c.artifact == key)).all()
    by_name = {file.name: File(file.digest, file.size) for file in sorted(files, key=lambda file: file.name)}
    return Artifact(key, row.kind, json.loads(row.meta), by_name)


def _read_files(connection: sql.Connection) -> list[tuple[str, str, File]]:
    query = sql.select(_artifacts.c.number, _files).join_from(_artifacts, _files)
    rows = sorted(connection.execute(query), key=lambda row: (row.number, row.name))
    return [(row.artifact, row.name, File(row.digest, row.size)) for row in rows]


def _read_counts(connection: sql.Connection, batches: Sequence[str]) -> list[tuple[str, str, int, int]]:
    found: dict[str, list[tuple[str, str, int, int]]] = {batch: [] for batch in batches}
    columns = (_counts.c.batch, _counts.c.prompt_uid, _counts.c.successes, _counts.c.failures)
    for chunk in _chunks(batches):
        query = sql.select(*columns).where(_counts.c.batch.in_(chunk)).order_by(_counts.c.position)
        for row in connection.execute(query):
            found[row.batch].append((row.batch, row.prompt_uid, row.successes, row.failures))
    return [row for rows in found.values() for row in rows]


def _chunks(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), _CHUNK):
        yield keys[start : start + _CHUNK]
