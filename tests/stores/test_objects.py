"""Objects: what has a final name is whole, and what is read is what was written."""

import errno
import hashlib
import os
import random
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import Damaged, Missing, disk
from stores.objects import File, Objects
from tests.stores.conftest import OPERATIONS


@given(data=st.binary(max_size=2000))
@settings(max_examples=20, deadline=None)
def test_bytes_round_trip(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """What is put is read again, under the name of its SHA-256."""
    kept = Objects(tmp_path_factory.mktemp("objects"))
    file = kept.put(data)
    assert file == File(hashlib.sha256(data).hexdigest(), len(data))
    assert kept.read(file) == data
    assert kept.path(file) == kept.root / "objects" / file.digest[:2] / file.digest


def test_files_and_bytes_are_the_same_object(tmp_path: Path) -> None:
    """A local file is stored under the name that its bytes have, and leaves no temporary."""
    data = random.Random(0).randbytes(3 << 20)
    (tmp_path / "big").write_bytes(data)
    kept = Objects(tmp_path / "store")
    assert kept.put_file(tmp_path / "big") == kept.put(data) == kept.put_file(tmp_path / "big")
    assert not list(kept.temporaries.iterdir())
    assert len(list(kept.folder.glob("*/*"))) == 1


def test_objects_are_read_only(tmp_path: Path) -> None:
    """Nobody has the right to write an object."""
    kept = Objects(tmp_path)
    mode = kept.path(kept.put(b"x")).stat().st_mode
    assert not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)


def test_the_disk_is_told_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is synced before it has its final name, and the folders after."""
    kept, calls = Objects(tmp_path), []
    for name in OPERATIONS:
        operation = getattr(disk, name)
        monkeypatch.setattr(disk, name, lambda *args, do=operation: (calls.append(do.__name__), do(*args))[1])
    kept.put(b"x")
    assert calls == ["create", "append", "sync", "make_folder", "rename", "sync_folder", "sync_folder"]


def test_absent_and_resized_objects_are_refused(tmp_path: Path) -> None:
    """A missing object is Missing; one of another size is Damaged, until somebody puts its bytes again."""
    kept = Objects(tmp_path)
    file = kept.put(b"abc")
    with pytest.raises(Missing, match="is not in the store"):
        kept.path(File("0" * 64, 1))
    kept.place(file).chmod(0o644)
    kept.place(file).write_bytes(b"abcd")
    with pytest.raises(Damaged, match="4 bytes, not 3"):
        kept.path(file)
    kept.put(b"abc")  # whoever has the bytes mends it
    assert kept.read(file) == b"abc"


def test_damage_after_a_check_is_seen(tmp_path: Path) -> None:
    """An object is hashed once, and again when it changes."""
    kept = Objects(tmp_path)
    file = kept.put(b"abc")
    kept.path(file)
    kept.place(file).chmod(0o644)
    kept.place(file).write_bytes(b"abd")
    os.utime(kept.place(file), ns=(1, 1))
    with pytest.raises(Damaged, match="SHA-256"):
        kept.path(file)


def test_damage_within_a_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    """An object that changes right after its check, with the same size, inode and time, is hashed again."""
    kept = Objects(tmp_path)
    file = kept.put(b"abc")
    moment = kept.path(file).stat().st_mtime_ns
    kept.place(file).chmod(0o644)
    kept.place(file).write_bytes(b"abd")
    os.utime(kept.place(file), ns=(moment, moment))
    with pytest.raises(Damaged, match="SHA-256"):
        kept.path(file)


def test_a_checked_object_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second path of an unchanged object costs no hashing."""
    kept = Objects(tmp_path)
    file, checks = kept.put(b"abc"), []
    os.utime(kept.place(file), (1, 1))
    check = kept._check
    monkeypatch.setattr(kept, "_check", lambda path, file: (checks.append(file), check(path, file)))
    kept.path(file), kept.path(file)
    assert checks == [file]


@pytest.mark.parametrize("from_file", [False, True])
def test_every_interrupted_put_leaves_nothing_half_written(
    tmp_path: Path, fail_at: Callable[[int], AbstractContextManager[None]], from_file: bool
) -> None:
    """Whichever operation fails: the errno stays, the message helps, no final name is half written, a repeat works."""
    source = tmp_path / "source"
    source.write_bytes(b"new" * 1000)
    for number in range(1, 8):
        kept = Objects(tmp_path / f"store-{number}-{from_file}")
        old = kept.put(b"old")
        with fail_at(number), pytest.raises(OSError, match="free some space") as failure:
            kept.put_file(source) if from_file else kept.put(source.read_bytes())
        assert failure.value.errno == errno.ENOSPC
        assert str(kept.root) in str(failure.value)
        assert not list(kept.temporaries.iterdir())
        for path in kept.folder.glob("*/*"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        assert kept.read(old) == b"old"
        assert kept.read(kept.put_file(source)) == source.read_bytes()


def test_a_full_disk_leaves_the_last_version(small_disk: Path) -> None:
    """On a disk of 1 MB the object that does not fit fails with ENOSPC, and the others are still read."""
    kept = Objects(small_disk / "store")
    first = kept.put(os.urandom(200_000))
    with pytest.raises(OSError, match="free some space") as failure:
        kept.put(os.urandom(2_000_000))
    assert failure.value.errno == errno.ENOSPC
    assert not list(kept.temporaries.iterdir())
    assert len(kept.read(first)) == 200_000
    assert len(kept.read(kept.put(os.urandom(200_000)))) == 200_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs needs root and the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_whoever_has_the_bytes_mends_a_damaged_object(tmp_path: Path) -> None:
    """Putting bytes, or a file of them, over an object that has rotted at its size leaves it whole."""
    kept = Objects(tmp_path / "store")
    (tmp_path / "source").write_bytes(b"abc")
    for put in (lambda: kept.put(b"abc"), lambda: kept.put_file(tmp_path / "source")):
        place = kept.place(put())
        place.chmod(0o644)
        place.write_bytes(b"abd")
        os.utime(place, ns=(1, 1))
        assert kept.read(put()) == b"abc"


def test_an_object_that_cannot_be_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails while an object is read is a typed error with its path."""
    kept = Objects(tmp_path)
    file = kept.put(b"abc")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(Damaged, match=r"cannot be read: \[Errno 5\]") as error:
        kept.verify(file)
    assert str(kept.place(file)) in str(error.value)
