"""Objects in a bucket: the bucket is the store, the local folder a cache that is never trusted."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from stores import Damaged, Missing, StoreError, open_store
from stores.objects import File
from stores.remote import RemoteObjects
from stores.verification import verify

Bucket = Callable[[], str]


@pytest.fixture
def objects(tmp_path: Path, bucket: Bucket) -> RemoteObjects:
    """Objects in an empty place of a bucket."""
    return RemoteObjects(tmp_path / "here", bucket())


def _elsewhere(objects: RemoteObjects, tmp_path: Path) -> RemoteObjects:
    return RemoteObjects(tmp_path / "elsewhere", objects.name)


def test_what_one_machine_puts_another_reads(objects: RemoteObjects, tmp_path: Path) -> None:
    """Bytes and files go to the bucket, once, and come from there, checked, and from the cache afterwards."""
    (tmp_path / "big").write_bytes(os.urandom(12 << 20))  # more than one part of an upload
    small, big = objects.put(b"small"), objects.put_file(tmp_path / "big")
    assert objects.put(b"small") == small
    other = _elsewhere(objects, tmp_path)
    assert other.exists(small) and not other.place(small).exists()
    assert other.read(small) == b"small" and other.read(big) == (tmp_path / "big").read_bytes()
    assert sorted(digest for digest, _ in other.listing()) == sorted([small.digest, big.digest])
    other._bucket.rm_file(other._remote(small.digest))
    assert other.read(small) == b"small"  # from the cache
    with pytest.raises(Missing, match=objects.name):
        other.verify(small)


def test_a_damaged_copy_is_fetched_again(objects: RemoteObjects) -> None:
    """A cached file that is not what it was is replaced from the bucket, in silence."""
    file = objects.put(b"whole")
    objects.place(file).unlink()
    objects.place(file).write_bytes(b"wrong")
    assert objects.read(file) == b"whole" == objects.place(file).read_bytes()


def test_a_damaged_original_is_never_cached(objects: RemoteObjects, tmp_path: Path) -> None:
    """Other bytes in the bucket are Damaged, with the URL, and leave nothing in the cache."""
    file, other = objects.put(b"whole"), _elsewhere(objects, tmp_path)
    for wrong, message in ((b"wrong", "SHA-256"), (b"longer", "6 bytes, not 5")):
        objects._bucket.pipe_file(objects._remote(file.digest), wrong)
        with pytest.raises(Damaged, match=message) as error:
            other.path(file)
        assert other._url(file.digest) in str(error.value)
        assert not other.place(file).exists() and not list(other.temporaries.iterdir())
    objects.put(b"whole")  # whoever has the bytes mends what shows by its size
    assert other.read(file) == b"whole"


def test_a_rotten_copy_is_not_uploaded(objects: RemoteObjects) -> None:
    """Where the bucket has lost an object, what goes up is what was put, and not what its local copy became."""
    file = objects.put(b"whole")
    objects._bucket.rm_file(objects._remote(file.digest))
    objects.place(file).unlink()
    objects.place(file).write_bytes(b"wrong")
    objects.put(b"whole")
    objects.verify(file)


def test_absent_objects_are_missing(objects: RemoteObjects) -> None:
    """What neither bucket nor cache has is Missing, with its URL."""
    with pytest.raises(Missing, match="s3://influent/"):
        objects.path(File("0" * 64, 1))


@pytest.mark.parametrize("url", ["ftp://host/x", "gs://bucket/x", "/mnt/share", "s3://key:secret@bucket/x", "bucket"])
def test_other_places_are_refused(tmp_path: Path, url: str) -> None:
    """Only stores whose uploads appear whole are taken, and no URL with credentials, which are not repeated."""
    with pytest.raises(StoreError, match="objects = ") as error:
        RemoteObjects(tmp_path, url)
    assert "secret" not in str(error.value)


def test_a_library_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library of the protocol the error says what to install."""

    def absent(*_: object, **__: object) -> None:
        raise ImportError("No module named 's3fs'")

    monkeypatch.setattr("fsspec.url_to_fs", absent)
    with pytest.raises(StoreError, match=r"s3fs.*pip install"):
        RemoteObjects(tmp_path, "s3://bucket/x")


def test_an_absent_bucket_and_an_absent_server_are_named(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is committed when the bucket is not there, or the server does not answer; and all is when it does."""
    store = open_store(tmp_path / "one", None, "s3://absent/x")
    with pytest.raises(StoreError, match=r"s3://absent/x.*create the bucket"):
        store.record("key", "t", {}, {"f": b"x"})
    url = bucket()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        away = open_store(tmp_path / "two", None, url)
        with pytest.raises(StoreError, match="check bucket, network and credentials"):
            away.record("key", "t", {}, {"f": b"x"})
        assert not away.done("key")
    store = open_store(tmp_path / "two", None, url)
    store.record("key", "t", {}, {"f": b"x"})  # the local copy alone was not enough
    assert all(verdict.wrong is None for verdict in verify(store))
