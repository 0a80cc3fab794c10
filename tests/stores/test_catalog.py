"""The catalog: one commit makes an artifact visible, once, and never again differently."""

import time
from pathlib import Path

import pytest

from stores import Conflict, Damaged, Missing, StoreError, rows, seals
from stores.canonical import canonical
from stores.catalog import Catalog
from stores.database import Database, sqlite_url
from stores.entries import Artifact
from stores.leases import Leases
from stores.objects import File

FILE = File("a" * 64, 3)


@pytest.fixture(params=["sqlite", "postgres"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Catalog:
    """An empty catalog, in each database."""
    if request.param == "sqlite":
        return Catalog(Database(sqlite_url(tmp_path / "catalog.sqlite")))
    return Catalog(Database(request.getfixturevalue("postgres")()))


def _execute(catalog: Catalog, statement: str) -> None:
    with catalog.database.transaction(write=True) as connection:
        connection.exec_driver_sql(statement)


def test_artifacts_round_trip(catalog: Catalog) -> None:
    """A committed artifact is what `get` gives, also after the catalog is opened again."""
    artifact = Artifact("key-1", "table", {"rows": 3, "names": ["a"]}, {"b/x": FILE, "a": File("b" * 64, 2**40)})
    assert catalog.get("key-1") is None
    assert catalog.commit(artifact) == artifact == catalog.get("key-1")
    assert Catalog(catalog.database).get("key-1") == artifact


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
    with catalog.database.transaction(write=True) as connection:
        for key in keys:
            if rows.find(connection, key) is None:
                rows.insert(connection, Artifact(key, "t", {}, {}), [])
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


@pytest.mark.parametrize("counts", [[("p", 1, 1), ("p", 1, 1)], [("p", -1, 0)], [("p", 1.0, 0)], [("p", 2**31, 0)]])
def test_unusable_counts_are_refused(catalog: Catalog, counts: list) -> None:
    """Counts are whole numbers from 0 up, one entry a prompt."""
    with pytest.raises(ValueError, match="'p'"):
        catalog.commit(Artifact("key", "t", {}, {}), counts)
    assert catalog.get("key") is None


def test_vanished_and_altered_rows_are_damaged(catalog: Catalog) -> None:
    """A row that somebody changed, added or removed behind the catalog's back is never taken for what was committed."""
    for number in range(3):
        catalog.commit(Artifact(f"key-{number}", "t", {"n": number}, {"f": FILE}), [("p", 1, number)])
    assert catalog.problems() == []
    for statement, key in (
        ("update artifacts set meta = '{\"n\":7}' where key = 'key-0'", "key-0"),
        ("update files set size = 4 where artifact = 'key-1'", "key-1"),
        ("insert into inputs values ('key-2', 'key-1')", "key-2"),
    ):
        _execute(catalog, statement)
        with pytest.raises(Damaged, match=f"the entry of {key}"):
            catalog.get(key)
    _execute(catalog, "update counts set successes = 2 where batch = 'key-0'")
    with pytest.raises(Damaged, match="the counts of key-0"):
        catalog.counts(["key-1", "key-0"])
    for table, column in (("files", "artifact"), ("inputs", "artifact"), ("counts", "batch"), ("artifacts", "key")):
        _execute(catalog, f"delete from {table} where {column} = 'key-2'")
    with pytest.raises(Damaged, match="lists 2 artifacts of 3"):
        catalog.keys()
    assert len(catalog.problems()) == 4
    assert all(catalog.name in problem for problem in catalog.problems())


def test_long_identities_are_kept_by_digest_and_their_inputs_whole(catalog: Catalog) -> None:
    """An entry of an identity that is too long to keep is kept as its SHA-256, and every key in it as an input."""
    inputs = [f"rollouts-{number:024x}" for number in range(500)]
    artifact = Artifact("key", "t", {}, {}, identity={"rollouts": inputs, "seed": 3, "not_a_key": "rollouts-1"})
    catalog.commit(artifact)
    stored = catalog.get("key")
    assert stored is not None and stored.identity is not None
    assert stored.inputs == tuple(sorted(inputs))
    assert stored.identity["seed"] == 3 and stored.identity["not_a_key"] == "rollouts-1"
    assert stored.identity["rollouts"] == {"sha256": seals.of_text(canonical(inputs))}


def test_the_retired_are_hidden_until_they_come_back_or_go(catalog: Catalog) -> None:
    """A retired artifact is found no more; the same commit takes it back; after its grace it is gone, unless leased."""
    artifact, leases = Artifact("key", "t", {}, {"f": FILE}), Leases(catalog.database)
    catalog.commit(artifact)
    catalog.retire("key")
    assert catalog.get("key") is None and catalog.keys() == [] and catalog.problems() == []
    with pytest.raises(Conflict):
        catalog.commit(Artifact("key", "other", {}, {}))
    catalog.commit(artifact)
    assert catalog.get("key") == artifact and catalog.keys() == ["key"]
    catalog.retire("key")
    assert catalog.remove_retired(time.time() - 60) == []
    with leases.hold("key"):
        assert catalog.remove_retired(time.time() + 1) == []
    with catalog.exclusive() as referenced:
        assert referenced == {FILE.digest}
    assert catalog.get("key") is None and catalog.get("key", retired=True) == artifact
    assert catalog.remove_retired(time.time() + 1) == ["key"]
    with catalog.exclusive() as referenced:
        assert referenced == set()
    assert catalog.files() == [] and catalog.keys() == [] and catalog.problems() == []
    catalog.commit(Artifact("key", "other", {}, {}))


def test_beliefs_are_never_retired(catalog: Catalog) -> None:
    """An artifact with counts stays, and an absent one is named."""
    catalog.commit(Artifact("batch", "t", {}, {}), [("p", 1, 0)])
    with pytest.raises(ValueError, match="beliefs lose nothing"):
        catalog.retire("batch")
    with pytest.raises(Missing, match="'absent'"):
        catalog.retire("absent")


def test_a_retirement_that_nobody_asked_for_is_damage(catalog: Catalog) -> None:
    """A moment of retirement that appears in a row by itself hides nothing, and removes nothing."""
    catalog.commit(Artifact("key", "t", {}, {"f": FILE}))
    _execute(catalog, "update artifacts set retired_at = 0")
    with pytest.raises(Damaged, match="the entry of key"):
        catalog.remove_retired(time.time())
    assert any("the entry of key" in problem for problem in catalog.problems())


def test_a_failed_check_stops_the_commit(catalog: Catalog) -> None:
    """What the check raises while nothing can be collected leaves nothing committed."""

    def gone() -> None:
        raise Missing("gone")

    with pytest.raises(Missing, match="gone"):
        catalog.commit(Artifact("key", "t", {}, {"f": FILE}), [("p", 1, 0)], check=gone)
    assert catalog.get("key") is None and catalog.files() == []


@pytest.mark.parametrize("url", ["garbage", "mysql://host/x", "sqlite+nothing:///x"])
def test_other_databases_are_refused(url: str) -> None:
    """A URL that is none, another database, and a driver that is not there are a typed error with a remedy."""
    with pytest.raises(StoreError, match=r"catalog = .*postgresql"):
        Database(url)
