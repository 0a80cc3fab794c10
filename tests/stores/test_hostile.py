"""Hostile files: whatever somebody puts in the way of a reader is refused, and nothing in it runs."""

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stores import Damaged, StoreError, open_store
from stores.bundles import read_rollouts
from stores.store import Store
from stores.vectors import read_vectors


class Touch:
    """Runs code when it is unpickled: creates the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of files that run code in a careless reader, and the marker that they would create."""
    folder, marker = tmp_path / "hostile", tmp_path / "marker"
    folder.mkdir()
    np.save(folder / "pickled.npy", np.array([Touch(marker)], dtype=object), allow_pickle=True)
    torch.save({"weight": Touch(marker)}, folder / "pytorch_model.bin")
    for name in ("rows.faiss", "rollouts.parquet", "rollouts.jsonl", "vectors.npy", "catalog.sqlite"):
        (folder / name).write_bytes(pickle.dumps(Touch(marker)))
    (folder / "garbage.faiss").write_bytes(b"IxMp" + bytes(range(256)) * 40)
    table = pa.table({"prompt_uid": ["../../../etc/passwd"], "vector": ["=cmd()"], "text": [str(marker)]})
    pq.write_table(table, folder / "paths.parquet")
    with tarfile.open(folder / "climbing.tar", "w") as archive:
        entry = tarfile.TarInfo("../../marker")
        archive.addfile(entry, io.BytesIO())
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with zipfile.ZipFile(folder / "climbing.zip", "w") as archive:
        archive.writestr("../../marker", "")
    (folder / "marker").mkdir()
    return folder, marker


def test_nothing_that_is_read_runs(hostile: tuple[Path, Path]) -> None:
    """Every reader of foreign files refuses every hostile file, by name, and the marker is never created."""
    folder, marker = hostile
    files = sorted(path for path in folder.iterdir() if path.is_file())
    assert len(files) == 11
    for path in files:
        for read in (read_vectors, read_rollouts):
            with pytest.raises((ValueError, OSError)) as error:
                read(path)
            assert path.name in str(error.value)
    with pytest.raises(Damaged, match=r"catalog\.sqlite"):
        open_store(folder)
    assert not marker.exists()
    pickle.loads((folder / "vectors.npy").read_bytes())  # noqa: S301  the files are what they are said to be
    assert marker.exists()


def test_nothing_that_is_stored_runs(
    store: Store, hostile: tuple[Path, Path], overwrite: Callable[..., None], rollouts: Callable[..., Any]
) -> None:
    """Objects that were replaced by hostile files are Damaged; so are those that were stored as something they are not."""
    folder, marker = hostile
    store.trajectories.write("rollouts", rollouts(0), {})
    names = {"policy": "p", "projection": "s", "objective": "grpo"}
    store.gradients.write("gradients", ["a"], np.ones((1, 4), np.float32), names)
    kept = {key: dict(store.get(key).files) for key in ("rollouts", "gradients")}
    reads = {
        "rollouts": lambda: store.trajectories.read(["rollouts"]),
        "gradients": lambda: store.gradients.read("gradients"),
    }
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        for key, files in kept.items():
            for file in files.values():
                overwrite(store, file, path.read_bytes())
            with pytest.raises(Damaged):
                reads[key]()
        for kind, name in (("trajectories", "rollouts.parquet"), ("gradients", "rows.parquet")):
            wrong = store.record(f"{kind}-{path.name}", kind, {"rows": 1, "dim": 4}, {name: path, "index.faiss": path})
            with pytest.raises((StoreError, ValueError)):
                store.trajectories.read([wrong]) if kind == "trajectories" else store.gradients.read(wrong)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "", "a//b"])
def test_names_never_leave_the_folder(store: Store, tmp_path: Path, name: str) -> None:
    """A file name that climbs is refused before anything is written."""
    with pytest.raises(ValueError, match="file name"):
        store.record("key", "policy", {}, {name: b"x"})
    assert not store.done("key") and not (tmp_path / "outside").exists()


def test_links_in_a_checkpoint_are_stored_as_what_they_show(store: Store, tmp_path: Path) -> None:
    """A link in a folder is stored as bytes, so that what comes back points nowhere."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "secret").write_text("content")
    (tmp_path / "policy" / "config.json").symlink_to(tmp_path / "secret")
    store.checkpoints.write("key", tmp_path / "policy", {})
    back = store.checkpoints.folder("key") / "config.json"
    assert not back.is_symlink() and back.read_text() == "content"


def test_a_lying_index_is_stopped_by_its_limits(tmp_path: Path) -> None:
    """A foreign index whose header claims 2^40 rows ends in an error, and not in a hang."""
    index = faiss.IndexFlatIP(8)
    index.add(np.ones((4, 8), np.float32))
    content = faiss.serialize_index(index).tobytes()
    claims = [struct.pack("<q", 1 << 40).join([content[:at], content[at + 8 :]]) for at in (8, len(content) - 136)]
    for number, claim in enumerate(claims):
        path = tmp_path / f"{number}.faiss"
        path.write_bytes(claim)
        with pytest.raises(ValueError, match=path.name):
            read_vectors(path)
