"""The catalog: one commit makes an artifact visible, once, and never again differently."""

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sql

from stores import Conflict, Damaged, Missing, StoreError, open_store
from stores.catalog import Artifact, Catalog, sqlite_url
from stores.objects import File

FILE = File("a" * 64, 3)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    """An empty catalog."""
    return Catalog(sqlite_url(tmp_path / "catalog.sqlite"))


def test_artifacts_round_trip(catalog: Catalog) -> None:
    """A committed artifact is what `get` gives, also after the catalog is opened again."""
    artifact = Artifact("key-1", "table", {"rows": 3, "names": ["a"]}, {"b/x": FILE, "a": File("b" * 64, 2**40)})
    assert catalog.get("key-1") is None
    assert catalog.commit(artifact) == artifact == catalog.get("key-1")
    assert Catalog(catalog.name).get("key-1") == artifact


def test_keys_come_in_the_order_of_commits(catalog: Catalog) -> None:
    """Keys are listed in the order of their commits, of one kind or of all."""
    for number, key in enumerate(["z", "a", "m"]):
        catalog.commit(Artifact(key, f"kind-{number % 2}", {}, {}))
    assert catalog.keys() == ["z", "a", "m"]
    assert catalog.keys("kind-0") == ["z", "m"]
    assert catalog.keys("absent") == []


def test_repeated_commits_change_nothing(catalog: Catalog) -> None:
    """The same content under the same key is a no-op, and its counts count once."""
    artifact = Artifact("batch", "trajectories", {"n": (1, 2)}, {"f": FILE})
    first = catalog.commit(artifact, [("p", 1, 2), ("q", 0, 3)])
    assert catalog.commit(artifact, [("p", 1, 2), ("q", 0, 3)]) == first
    assert first.meta == {"n": [1, 2]}
    assert catalog.counts(["batch"]) == [("batch", "p", 1, 2), ("batch", "q", 0, 3)]
    assert catalog.keys() == ["batch"]


@pytest.mark.parametrize(
    ("kind", "meta", "files", "counts", "what"),
    [
        ("other", {"n": 1}, {"f": FILE}, [("p", 1, 2)], "kind"),
        ("table", {"n": 2}, {"f": FILE}, [("p", 1, 2)], r"meta\['n'\]"),
        ("table", {"n": 1, "m": 1}, {"f": FILE}, [("p", 1, 2)], r"meta\['m'\]"),
        ("table", {"n": 1}, {"f": File("b" * 64, 3)}, [("p", 1, 2)], "file 'f'"),
        ("table", {"n": 1}, {}, [("p", 1, 2)], "file 'f'"),
        ("table", {"n": 1}, {"f": FILE}, [("p", 2, 2)], "counts"),
    ],
)
def test_other_content_under_a_key_is_a_conflict(
    catalog: Catalog, kind: str, meta: dict, files: dict, counts: list, what: str
) -> None:
    """A key never changes its content, and the error says what differs."""
    first = catalog.commit(Artifact("key", "table", {"n": 1}, {"f": FILE}), [("p", 1, 2)])
    with pytest.raises(Conflict, match=what):
        catalog.commit(Artifact("key", kind, meta, files), counts)
    assert catalog.get("key") == first


def test_counts_come_by_batch_then_position(catalog: Catalog) -> None:
    """Counts come in the order of the batches asked for, each batch once, over more batches than one query takes."""
    keys = [f"batch-{number}" for number in range(1100)]
    for number in (0, 3, 1099):
        catalog.commit(Artifact(keys[number], "trajectories", {}, {}), [("z", number, 0), ("a", 0, number)])
    with pytest.raises(Missing, match="'batch-1'"):
        catalog.counts(keys)
    with sqlite3.connect(catalog.name.removeprefix("sqlite:///")) as connection:
        rows = [(key, number + 10, "t", "{}", "") for number, key in enumerate(keys)]
        connection.executemany("insert or ignore into artifacts values (?, ?, ?, ?, ?)", rows)
    assert catalog.counts([*reversed(keys), keys[0]]) == [
        (keys[number], *row) for number in (1099, 3, 0) for row in (("z", number, 0), ("a", 0, number))
    ]
    assert catalog.counts([]) == []


@pytest.mark.parametrize("key", ["", "../x", "a/b", ".hidden", "a" * 201, "a b"])
def test_unusable_keys_are_refused(catalog: Catalog, key: str) -> None:
    """A key that could not be a file name is an error."""
    with pytest.raises(ValueError, match="key is"):
        catalog.commit(Artifact(key, "t", {}, {}))


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a"])
def test_unusable_file_names_are_refused(catalog: Catalog, name: str) -> None:
    """A file name that could leave its folder is an error."""
    with pytest.raises(ValueError, match="file name"):
        catalog.commit(Artifact("key", "t", {}, {name: FILE}))


@pytest.mark.parametrize("counts", [[("p", 1, 1), ("p", 1, 1)], [("p", -1, 0)], [("p", 1.0, 0)]])
def test_unusable_counts_are_refused(catalog: Catalog, counts: list) -> None:
    """Counts are whole numbers from 0 up, one entry a prompt."""
    with pytest.raises(ValueError, match="'p'"):
        catalog.commit(Artifact("key", "t", {}, {}), counts)
    assert catalog.get("key") is None


def test_a_failed_commit_leaves_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the counts cannot be written the artifact is not there either."""
    with sqlite3.connect(catalog.name.removeprefix("sqlite:///")) as connection:
        connection.execute("create trigger t before insert on counts begin select raise(fail, 'no'); end")
    with pytest.raises(StoreError, match="no"):
        catalog.commit(Artifact("key", "t", {}, {"f": FILE}), [("p", 1, 1)])
    assert catalog.get("key") is None
    assert catalog.files() == []


def test_newer_schema_versions_are_refused(catalog: Catalog) -> None:
    """A catalog of a newer version is not opened, and the error says what to do."""
    with sqlite3.connect(catalog.name.removeprefix("sqlite:///")) as connection:
        connection.execute("update schema_version set version = 99")
    with pytest.raises(StoreError, match=r"version 99.*upgrade"):
        Catalog(catalog.name)


def test_a_file_that_is_no_database_is_damaged(tmp_path: Path) -> None:
    """Garbage in the catalog's place is a typed error with its name."""
    (tmp_path / "catalog.sqlite").write_bytes(b"garbage" * 1000)
    with pytest.raises(Damaged, match=r"catalog\.sqlite"):
        Catalog(sqlite_url(tmp_path / "catalog.sqlite"))


def test_an_unreachable_database_is_named(tmp_path: Path) -> None:
    """A catalog in a folder that is not there is a typed error with its name."""
    with pytest.raises(StoreError, match=r"absent/catalog\.sqlite"):
        Catalog(sqlite_url(tmp_path / "absent" / "catalog.sqlite"))


def test_sqlite_is_set_to_be_durable(catalog: Catalog) -> None:
    """Every connection has WAL, full synchronisation, foreign keys and a busy timeout of 60 s."""
    with catalog._engine.connect() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        assert [connection.scalar(sql.text(f"PRAGMA {name}")) for name in pragmas] == ["wal", 2, 1, 60000]


WRITER = """
import sys
from pathlib import Path
from stores import open_store
store, writer = open_store(Path(sys.argv[1])), sys.argv[2]
for number in range(int(sys.argv[3])):
    key = f"{writer}-{number}"
    store.record(key, "t", {"number": number}, {"f": key.encode() * 100, "g": b"same"}, [(f"p{number % 3}", 1, 2)])
    print(key, flush=True)
"""


def _start(root: Path, writer: str, commits: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(root), writer, str(commits)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_nothing_acknowledged_is_lost_to_a_kill(tmp_path: Path) -> None:
    """A writer killed in the middle, five times: all it acknowledged is there, whole, and the catalog opens."""
    acknowledged: list[str] = []
    for attempt in range(5):
        process = _start(tmp_path, f"writer{attempt}", 100_000)
        assert process.stdout is not None
        acknowledged.append(process.stdout.readline().strip())
        time.sleep(0.05 + 0.05 * attempt)
        process.send_signal(signal.SIGKILL)
        acknowledged += [line.strip() for line in process.stdout.read().splitlines(keepends=True) if line[-1] == "\n"]
        process.wait()
    store = open_store(tmp_path)
    keys = store.catalog.keys()
    assert len(acknowledged) > 5
    assert set(acknowledged) <= set(keys)
    assert len(keys) <= len(acknowledged) + 5
    assert all(error is None for *_, error in store.verify())
    assert len(list(store.verify())) == 2 * len(keys) == 2 * len(store.catalog.counts(keys))


def test_writers_take_turns(tmp_path: Path) -> None:
    """Three processes that open a new store and commit to it at once all succeed, and nothing is lost."""
    processes = [_start(tmp_path, f"writer{number}", 15) for number in range(3)]
    printed = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    keys = open_store(tmp_path).catalog.keys()
    assert sorted(keys) == sorted(key for keys in printed for key in keys)
    assert len(keys) == 45
