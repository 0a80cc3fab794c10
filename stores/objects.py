"""Content-addressed files that are never changed: `<root>/objects/<2 hex>/<sha256>`.

Everything that touches the disk goes through the six operations at the top, so that a test can fail, record or drop
each of them. The order of a put is: create under `<root>/tmp`, append, sync, rename, sync the folder. Whatever has a
final name is therefore whole, and what was cut short lies in `tmp`, where no reader looks.
"""

import errno
import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stores.errors import Damaged, Missing

_CHUNK = 1 << 20
_TICK = 50_000_000  # ns; within one tick of the disk's clock a second change has the same time as the first
_REMEDIES = {
    errno.ENOSPC: "free some space on that disk and repeat the step",
    errno.EDQUOT: "raise the quota or free some space and repeat the step",
    errno.EACCES: "make the folder writable and repeat the step",
    errno.EROFS: "choose a folder on a writable disk and repeat the step",
}


# ---- the six operations -------------------------------------------------------------------------------------------


def create(path: Path, mode: int = 0o444) -> int:
    """Create a file that must not exist; returns a descriptor that can be written whatever the mode."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def append(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of the data at the end."""
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(descriptor, rest) :]


def sync(descriptor: int) -> None:
    """Wait until the file's content is on the disk."""
    os.fsync(descriptor)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder its final name, replacing a file of that name."""
    os.rename(source, target)


def sync_folder(path: Path) -> None:
    """Wait until the folder's names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unlink(path: Path) -> None:
    """Remove a name."""
    os.unlink(path)


# ---- what is built from them --------------------------------------------------------------------------------------


def write_file(path: Path, chunks: Iterable[bytes], mode: int = 0o444) -> None:
    """Write a new file and wait until it is on the disk; a failed write leaves no file.

    Raises:
        OSError: with the errno of the failure, the path and the remedy.
    """
    with remedied(path):
        descriptor = create(path, mode)
        try:
            for chunk in chunks:
                append(descriptor, chunk)
            sync(descriptor)
        except OSError:
            with suppress(OSError):
                unlink(path)
            raise
        finally:
            os.close(descriptor)


@contextmanager
def remedied(path: Path) -> Iterator[None]:
    """Re-raise an OSError with the path and the remedy in its message, keeping its errno."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk and repeat the step")
        message = f"{error.strerror or error} while writing {path}; nothing was committed: {remedy}"
        raise OSError(error.errno or errno.EIO, message) from error


@dataclass(frozen=True)
class File:
    """The identity of some bytes: hexadecimal SHA-256, and length in bytes."""

    digest: str
    size: int


class Objects:
    """The object folder of one store.

    Args:
        root: The store's folder; `objects` and `tmp` are made in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "objects"
        self.temporaries = root / "tmp"
        for folder in (self.folder, self.temporaries):
            folder.mkdir(parents=True, exist_ok=True)
        sync_folder(root)
        self._prefixes: set[str] = set()
        self._verified: dict[str, tuple[int, int, int]] = {}

    def temporary(self) -> Path:
        """A fresh name in `tmp`."""
        return self.temporaries / uuid.uuid4().hex

    def place(self, file: File) -> Path:
        """Where a file's bytes lie, present or not."""
        return self.folder / file.digest[:2] / file.digest

    def put(self, data: bytes) -> File:
        """Store bytes; putting what is there already is a no-op.

        Raises:
            OSError: the disk refused; nothing half written has a final name.
            Damaged: the object is there with another size.
        """
        file = File(hashlib.sha256(data).hexdigest(), len(data))
        if self.place(file).exists():
            self._settle(file)
            return file
        temporary = self.temporary()
        write_file(temporary, [data])
        self._adopt(temporary, file)
        return file

    def put_file(self, path: Path) -> File:
        """Store a local file of any size, reading it once in chunks of 1 MiB; errors as for `put`."""
        temporary, digest, size = self.temporary(), hashlib.sha256(), 0

        def chunks() -> Iterator[bytes]:
            nonlocal size
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                yield chunk

        with path.open("rb") as source:
            write_file(temporary, chunks())
        file = File(digest.hexdigest(), size)
        self._adopt(temporary, file)
        return file

    def path(self, file: File) -> Path:
        """The path of an object whose size and SHA-256 have been checked, once per process and version on disk.

        Raises:
            Missing: the object is not there.
            Damaged: size or SHA-256 differ.
        """
        path = self.place(file)
        if self._verified.get(file.digest) != self._stamp(path):
            self.verify(file)
        return path

    def verify(self, file: File) -> None:
        """Read an object and compare size and SHA-256, whatever was checked before; errors as for `path`."""
        path = self.place(file)
        stamp = self._stamp(path)
        self._check_size(path, file)
        with path.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
        if digest != file.digest:
            raise Damaged(self._damage(path, f"its SHA-256 is {digest}"))
        if time.time_ns() - stamp[0] > _TICK:
            self._verified[file.digest] = stamp

    def read(self, file: File) -> bytes:
        """The verified bytes of an object; errors as for `path`."""
        return self.path(file).read_bytes()

    def _adopt(self, temporary: Path, file: File) -> None:
        """Give a finished temporary its final name, or drop it when the object is there."""
        place = self.place(file)
        try:
            with remedied(place):
                if place.exists():
                    unlink(temporary)
                else:
                    place.parent.mkdir(exist_ok=True)
                    rename(temporary, place)
        except OSError:
            with suppress(OSError):
                unlink(temporary)
            raise
        self._settle(file)

    def _settle(self, file: File) -> None:
        """Make an object's name durable, and young again for the collector: it is about to be referenced."""
        place = self.place(file)
        self._check_size(place, file)
        with remedied(place):
            with suppress(PermissionError):  # another user's object: the collector's grace counts from its own age
                os.utime(place)
            sync_folder(place.parent)
            if place.parent.name not in self._prefixes:
                sync_folder(self.folder)
                self._prefixes.add(place.parent.name)

    def _check_size(self, path: Path, file: File) -> None:
        size = path.stat().st_size
        if size != file.size:
            raise Damaged(self._damage(path, f"it has {size} bytes, not {file.size}"))

    def _stamp(self, path: Path) -> tuple[int, int, int]:
        try:
            stat = path.stat()
        except FileNotFoundError as error:
            raise Missing(
                f"object {path} is not in the store at {self.root}; restore it from a copy of the store"
            ) from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _damage(self, path: Path, what: str) -> str:
        return (
            f"object {path} of the store at {self.root} is damaged: {what}; "
            "restore it from a copy, or remove it and repeat the step that made it"
        )
