"""Databases: set to be durable, brought to the newest schema, and refused by name where they cannot be used."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sql

from stores import Damaged, StoreError, schema
from stores.database import Database, on_network, sqlite_url
from stores.migrations import VERSION_TABLE


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database of each kind."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path / "catalog.sqlite")
    return request.getfixturevalue("postgres")()


def test_migrations_end_at_the_tables_of_the_code(url: str) -> None:
    """What the migrations make of nothing has the tables and columns that the code reads and writes."""
    with Database(url).transaction() as connection:
        inspector = sql.inspect(connection)
        made = {
            table: {(column["name"], column["nullable"]) for column in inspector.get_columns(table)}
            for table in inspector.get_table_names()
        }
    wanted = {
        table.name: {(column.name, bool(column.nullable)) for column in table.columns}
        for table in schema.tables.sorted_tables
    }
    assert made.keys() - wanted.keys() == {VERSION_TABLE}
    assert {name: made[name] for name in wanted} == wanted


def test_an_open_catalog_is_opened_without_alembic(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a database that is new or old is migrated."""
    Database(url)
    monkeypatch.setattr("stores.migrations.migrate", None)
    Database(url)


def test_newer_schema_versions_are_refused(url: str) -> None:
    """A catalog of a newer version is not opened, and the error says what to do."""
    with Database(url).transaction(write=True) as connection:
        connection.execute(sql.text("update schema_version set version = 99"))
    with pytest.raises(StoreError, match=r"version 99.*upgrade"):
        Database(url)


def test_a_failed_migration_changes_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration is one transaction: cut short, it leaves the database as it was."""

    def broken(connection: sql.Connection, found: int) -> None:
        connection.execute(sql.text("create table half (x integer)"))
        raise StoreError("cut short")

    with monkeypatch.context() as patch, pytest.raises(StoreError, match="cut short"):
        patch.setattr("stores.migrations.migrate", broken)
        Database(url)
    with Database(url).transaction() as connection:
        assert not sql.inspect(connection).has_table("half")


def test_readers_see_one_state(postgres: Callable[[], str]) -> None:
    """What a transaction reads on Postgres does not change while it reads."""
    one, other = (Database(url) for url in [postgres()] * 2)
    with one.transaction() as reading:
        before = reading.execute(sql.select(schema.head.c.value).order_by(schema.head.c.name)).all()
        with other.transaction(write=True) as writing:
            writing.execute(schema.head.update().values(value=7))
        assert reading.execute(sql.select(schema.head.c.value).order_by(schema.head.c.name)).all() == before


def test_a_file_that_is_no_database_is_damaged(tmp_path: Path) -> None:
    """Garbage in the catalog's place is a typed error with its name."""
    (tmp_path / "catalog.sqlite").write_bytes(b"garbage" * 1000)
    with pytest.raises(Damaged, match=r"catalog\.sqlite"):
        Database(sqlite_url(tmp_path / "catalog.sqlite"))


def test_an_unreachable_database_is_named(tmp_path: Path) -> None:
    """A catalog in a folder that is not there, or on a server that is not there, is a typed error with its name."""
    with pytest.raises(StoreError, match=r"absent/catalog\.sqlite"):
        Database(sqlite_url(tmp_path / "absent" / "catalog.sqlite"))
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9") as error:
        Database("postgresql+psycopg://me:secret@127.0.0.1:9/none")
    assert "secret" not in str(error.value)


def test_sqlite_is_set_to_be_durable(tmp_path: Path) -> None:
    """Every connection has WAL, full synchronisation, foreign keys and a busy timeout of 60 s."""
    database = Database(sqlite_url(tmp_path / "catalog.sqlite"))
    with database.transaction() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        assert [connection.scalar(sql.text(f"PRAGMA {name}")) for name in pragmas] == ["wal", 2, 1, 60000]


def test_pages_that_contradict_each_other_are_found(tmp_path: Path) -> None:
    """What SQLite's own check finds is reported with the name of the catalog."""
    database = Database(sqlite_url(tmp_path / "catalog.sqlite"))
    assert database.problems() == []
    with sqlite3.connect(tmp_path / "catalog.sqlite") as connection:
        connection.execute("pragma writable_schema = on")
        connection.execute("update sqlite_master set sql = replace(sql, 'kind TEXT NOT NULL', 'kind TEXT CHECK (0)')")
        connection.execute("insert into schema_version values (1)")
        connection.execute("pragma writable_schema = off")
        connection.execute("delete from schema_version where version = 1")
    with sqlite3.connect(tmp_path / "catalog.sqlite") as connection:
        root = connection.execute("select rootpage from sqlite_master where name = 'head'").fetchone()[0]
        size = connection.execute("pragma page_size").fetchone()[0]
    content = bytearray((tmp_path / "catalog.sqlite").read_bytes())
    content[(root - 1) * size + 3 : (root - 1) * size + 5] = b"\x00\x09"  # the page lists cells that it does not have
    (tmp_path / "catalog.sqlite").write_bytes(content)
    assert any("catalog.sqlite" in problem for problem in _problems(database))


def _problems(database: Database) -> list[str]:
    try:
        return database.problems()
    except Damaged as error:
        return [str(error)]


def test_network_file_systems_are_recognised() -> None:
    """The mount that holds a path is the longest that is above it."""
    mounts = "\n".join(
        [
            "/dev/sda / ext4 rw 0 0",
            "server:/x /mnt nfs4 rw 0 0",
            "/dev/sdb /mnt/local xfs rw 0 0",
            "s /mntx cifs rw 0 0",
        ]
    )
    assert on_network(Path("/home/me/catalog.sqlite"), mounts) is None
    assert on_network(Path("/mnt/runs/catalog.sqlite"), mounts) == "nfs4"
    assert on_network(Path("/mnt/local/catalog.sqlite"), mounts) is None
    assert on_network(Path("/mntx"), mounts) == "cifs"


def test_a_catalog_on_a_network_file_system_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning names the catalog, the file system and the remedy."""
    monkeypatch.setattr("stores.database.on_network", lambda path, mounts: "nfs4")
    with pytest.warns(UserWarning, match=r"catalog\.sqlite.*nfs4.*Postgres"):
        Database(sqlite_url(tmp_path / "catalog.sqlite"))
