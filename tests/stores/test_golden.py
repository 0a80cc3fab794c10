"""Folders of every schema version that was ever in use open, and hold what they held."""

import json
import shutil
from pathlib import Path

import pytest

from stores import StoreError, open_store, parquet, schema
from stores.parquet import to_table
from stores.store import Store
from stores.verification import verify
from tests.stores.golden import contents, fill

FOLDERS = sorted((Path(__file__).parents[1] / "golden" / "stores").iterdir())


def test_every_version_has_its_folder() -> None:
    """There is a folder for each version up to the newest."""
    assert [folder.name for folder in FOLDERS] == [str(number + 1) for number in range(schema.VERSION)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_old_versions_open(folder: Path, tmp_path: Path) -> None:
    """A store of an older version reads as it did, verifies, takes new entries, and opens again."""
    shutil.copytree(folder, tmp_path / "store")
    expected = json.loads((folder / "contents.json").read_text())
    store = open_store(tmp_path / "store")
    assert json.loads(json.dumps(contents(store))) == expected
    assert all(verdict.wrong is None for verdict in verify(store))
    fill(store)  # the same content under the same keys changes nothing
    store.record("new", "t", {}, {"f": b"x"})
    assert open_store(tmp_path / "store").catalog.keys() == [*store.catalog.keys()[:-1], "new"]


def test_what_is_written_now_reads_as_ever(store: Store) -> None:
    """The same columns give the same content today, on each kind of store."""
    fill(store)
    assert json.loads(json.dumps(contents(store))) == json.loads((FOLDERS[0] / "contents.json").read_text())


def test_newer_files_are_refused(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Parquet file of a newer version is refused, and the message says what to do."""
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "VERSION", 99)
        local.record("key", "scores", {}, {"table.parquet": parquet.encode(to_table({"x": [1]}))})
    with pytest.raises(StoreError, match=r"version 99.*upgrade"):
        local.tables.read("key")
