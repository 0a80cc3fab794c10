"""Objects in a bucket, through fsspec, with the local object folder as their cache. The door to ``fsspec``.

A put writes the local object first and then the same bytes under `<url>/<2 hex>/<sha256>`: object stores show an
upload whole or not at all, and have it durable when they answer. A read takes the local copy when there is one, and
downloads it otherwise; either way size and SHA-256 are checked. The bucket is the store: what lies in the local folder
alone is not kept.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from stores import disk
from stores.errors import Damaged, Missing, StoreError, Unreachable
from stores.objects import File, Objects

PROTOCOLS = ("s3",)
"""What may be named: stores whose uploads appear whole, and that were tried."""
_CHUNK = 1 << 20


class RemoteObjects(Objects):
    """The objects of one store in a bucket.

    Args:
        root: The local folder; `objects` in it is the cache.
        url: Where the objects are, such as `s3://bucket/influent`. Endpoint and credentials come from the environment
            or from the configuration files of the provider's own library, and never from here.

    Raises:
        StoreError: another protocol, or its library is not installed.
    """

    def __init__(self, root: Path, url: str) -> None:
        super().__init__(root)
        protocol = url.partition("://")[0]
        if protocol not in PROTOCOLS or "@" in url:
            raise StoreError(
                f"objects = {_hidden(url)!r}: give a URL of {', '.join(PROTOCOLS)}, without credentials, such as "
                "'s3://bucket/influent'; or leave it empty for a local folder"
            )
        self.name = url.rstrip("/")
        try:
            self._bucket: Any
            self._bucket, self._prefix = fsspec.url_to_fs(self.name, skip_instance_cache=True, use_listings_cache=False)
        except ImportError as error:
            raise StoreError(f"objects = {url!r}: {error}; pip install 'influent[s3]'") from error

    def exists(self, file: File) -> bool:
        """Whether the bucket has the object, by name alone."""
        with self._reaching(file.digest):
            return bool(self._bucket.exists(self._remote(file.digest)))

    def path(self, file: File) -> Path:
        """A local copy of an object, as for `Objects.path`; it is fetched when it is not there or not what it was."""
        try:
            return super().path(file)
        except (Missing, Damaged):
            self._fetch(file)
            return super().path(file)

    def verify(self, file: File) -> None:
        """Read an object from the bucket and compare size and SHA-256; errors as for `path`."""
        digest, size = hashlib.sha256(), 0
        for chunk in self._remote_chunks(file):
            digest.update(chunk)
            size += len(chunk)
        self._compare(file, File(digest.hexdigest(), size))

    def listing(self) -> Iterator[tuple[str, float]]:
        """The digest of every object in the bucket, and when it was uploaded."""
        with self._reaching("*"):
            found = self._bucket.find(self._prefix, detail=True) if self._bucket.exists(self._prefix) else {}
        for name, info in found.items():
            yield name.rsplit("/", 1)[-1], info["LastModified"].timestamp()

    def cached(self) -> Iterator[tuple[str, float]]:
        """The digest of every local copy, and when it was made."""
        return super().listing()

    def drop_copy(self, digest: str) -> None:
        """Remove the local copy of an object, and leave the bucket alone."""
        super().delete(digest)

    def delete(self, digest: str) -> None:
        """Remove an object, in the bucket and here."""
        with self._reaching(digest):
            if self._bucket.exists(self._remote(digest)):
                self._bucket.rm_file(self._remote(digest))
        super().delete(digest)

    def _settle(self, file: File) -> None:
        super()._settle(file)
        if self._remote_size(file) != file.size:
            self._check(self.place(file), file)  # what is uploaded was read
            with self._reaching(file.digest):
                self._bucket.put_file(str(self.place(file)), self._remote(file.digest))
        if (size := self._remote_size(file)) != file.size:
            raise Damaged(self._damage(self._url(file.digest), f"it has {size} bytes, not {file.size}"))

    def _remote_size(self, file: File) -> int | None:
        with self._reaching(file.digest):
            try:
                return int(self._bucket.info(self._remote(file.digest))["size"])
            except FileNotFoundError:
                return None

    def _fetch(self, file: File) -> None:
        temporary = self.temporary()
        with disk.new_file(temporary) as new:
            for chunk in self._remote_chunks(file):
                new.write(chunk)
            self._compare(file, File(new.digest, new.size))
        place = self.place(file)
        disk.make_folder(place.parent)
        disk.rename(temporary, place)  # over a damaged copy, if there is one

    def _remote_chunks(self, file: File) -> Iterator[bytes]:
        with self._reaching(file.digest):
            try:
                source = self._bucket.open(self._remote(file.digest), "rb", block_size=_CHUNK, cache_type="readahead")
            except FileNotFoundError as error:
                raise Missing(self._absence(self._url(file.digest))) from error
            with source:
                while chunk := source.read(_CHUNK):
                    yield chunk

    def _compare(self, wanted: File, found: File) -> None:
        if found.size != wanted.size:
            raise Damaged(self._damage(self._url(wanted.digest), f"it has {found.size} bytes, not {wanted.size}"))
        if found.digest != wanted.digest:
            raise Damaged(self._damage(self._url(wanted.digest), f"its SHA-256 is {found.digest}"))

    def _remote(self, digest: str) -> str:
        return f"{self._prefix}/{digest[:2]}/{digest}"

    def _url(self, digest: str) -> str:
        return f"{self.name}/{digest[:2]}/{digest}"

    @contextmanager
    def _reaching(self, digest: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise StoreError(f"{self.name}: {error}; create the bucket, or name one that is there") from error
        except Exception as error:  # each provider's library has its own, beside OSError
            raise Unreachable(
                f"{self._url(digest)}: {error}; check bucket, network and credentials, and repeat"
            ) from error


def _hidden(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://***@{rest.rpartition('@')[2]}" if "@" in rest else url
