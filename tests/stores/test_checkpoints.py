"""Checkpoints: a folder comes back as it was, linked to verified objects."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stores import Damaged
from stores.collector import collect
from stores.store import Store


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A checkpoint folder with a folder inside."""
    folder = tmp_path / "policy"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(5000))
    (folder / "tokenizer" / "vocab.txt").write_text("a b")
    return folder


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_comes_back(store: Store, policy: Path) -> None:
    """Every file of every folder is there again, as a hard link to its object."""
    store.checkpoints.write("key", policy, {"step": 3})
    folder = store.checkpoints.folder("key")
    assert folder == store.root / "checkpoints" / "key"
    assert _contents(folder) == _contents(policy)
    assert (folder / "config.json").samefile(store.file("key", "policy", "config.json"))
    assert store.meta("key") == {"step": 3}


def test_linked_files_are_followed(store: Store, policy: Path, tmp_path: Path) -> None:
    """A checkpoint of symbolic links, as download caches have, is stored by content."""
    links = tmp_path / "links"
    links.mkdir()
    (links / "config.json").symlink_to(policy / "config.json")
    store.checkpoints.write("key", links, {})
    assert _contents(store.checkpoints.folder("key")) == {"config.json": b"{}"}


def test_a_complete_folder_is_used_again(store: Store, policy: Path) -> None:
    """The folder is made once."""
    store.checkpoints.write("key", policy, {})
    inode = store.checkpoints.folder("key").stat().st_ino
    assert store.checkpoints.folder("key").stat().st_ino == inode


def test_a_changed_folder_is_made_again(store: Store, policy: Path) -> None:
    """A file that was removed or replaced in the folder is there again at the next call."""
    store.checkpoints.write("key", policy, {})
    folder = store.checkpoints.folder("key")
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(b"other")
    assert _contents(store.checkpoints.folder("key")) == _contents(policy)
    collect(store, grace_seconds=0)
    assert not list(store.objects.temporaries.iterdir())


def test_copies_do_where_links_do_not(store: Store, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk without hard links the folder holds copies, and is used again as long as they are right."""

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    store.checkpoints.write("key", policy, {})
    folder = store.checkpoints.folder("key")
    inode = folder.stat().st_ino
    assert _contents(store.checkpoints.folder("key")) == _contents(policy)
    assert folder.stat().st_ino == inode and not (folder / "config.json").samefile(policy / "config.json")
    (folder / "config.json").write_text("[]")
    assert _contents(store.checkpoints.folder("key")) == _contents(policy)


def test_a_damaged_object_makes_no_folder(store: Store, policy: Path, overwrite: Callable[..., None]) -> None:
    """A policy with a rotten file is Damaged, not loaded."""
    store.checkpoints.write("key", policy, {})
    store.checkpoints.folder("key")
    overwrite(store, store.get("key").files["model.safetensors"], os.urandom(5000))
    with pytest.raises(Damaged, match="SHA-256"):
        store.checkpoints.folder("key")


def test_a_folder_cut_short_is_not_there(store: Store, policy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a link or a copy fails in the middle there is no folder, and no temporary."""
    store.checkpoints.write("key", policy, {})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", fail)
        patch.setattr("shutil.copyfile", fail)
        with pytest.raises(OSError, match="No space"):
            store.checkpoints.folder("key")
    assert not (store.root / "checkpoints" / "key").exists()
    assert not list(store.objects.temporaries.iterdir())
    assert _contents(store.checkpoints.folder("key")) == _contents(policy)


def test_an_empty_folder_is_refused(store: Store, tmp_path: Path) -> None:
    """A folder without files, or that is not there, is no checkpoint."""
    with pytest.raises(ValueError, match="holds no file"):
        store.checkpoints.write("key", tmp_path / "absent", {})
