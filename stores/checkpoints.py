"""Policies: every file of a checkpoint folder is an object, and a folder of hard links brings them together again."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from stores import disk
from stores.disk import remedied
from stores.entries import Artifact
from stores.store import Store

KIND = "policy"


class Checkpoints:
    """Checkpoint folders of a store, by key."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, key: str, folder: Path, meta: dict[str, Any]) -> str:
        """Commit every file of a folder and of the folders in it.

        Args:
            key: From `Store.key`.
            folder: For instance what `save_pretrained` wrote.
            meta: JSON-able facts.

        Returns:
            The key.

        Raises:
            ValueError: there is no file in the folder.
            Conflict: the key is taken by other content.
            OSError: the disk refused; nothing is committed.
        """
        files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if not files:
            raise ValueError(f"folder {folder} holds no file; pass the folder that the policy was saved in")
        return self._store.record(key, KIND, meta, files)

    def folder(self, key: str) -> Path:
        """A folder with the verified files of a checkpoint, for reading only: they are hard links into the store.

        Raises:
            Missing: the key, or an object of it, is not in the store.
            Damaged: an object is not what was stored.
        """
        artifact = self._store.expect(key, KIND)
        target = self._store.root / "checkpoints" / key
        if not self._is_complete(target, artifact):
            self._build(target, artifact)
        return target

    def _is_complete(self, target: Path, artifact: Artifact) -> bool:
        """Whether every file is there, as the verified object itself or a copy with the same bytes."""
        for name, file in artifact.files.items():
            source, link = self._store.objects.path(file), target / name
            if not link.is_file():
                return False
            if not link.samefile(source) and _digest(link) != file.digest:
                return False
        return True

    def _build(self, target: Path, artifact: Artifact) -> None:
        temporary = self._store.objects.temporary()
        try:
            for name, file in artifact.files.items():
                _link(self._store.objects.path(file), temporary / name)
            target.parent.mkdir(exist_ok=True)
            with remedied(target):
                if target.exists():  # incomplete or changed: out of the way, for the collector
                    disk.rename(target, self._store.objects.temporary())
                disk.rename(temporary, target)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            if not self._is_complete(target, artifact):  # else another process was faster
                raise


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
