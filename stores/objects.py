"""Content-addressed files that are never changed: `<root>/objects/<2 hex>/<sha256>`.

The order of a put is: create under `<root>/tmp`, append, sync, rename, sync the folder. Whatever has a final name is
therefore whole, and what was cut short lies in `tmp`, where no reader looks.
"""

import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stores import disk
from stores.errors import Damaged, Missing

_TICK = 50_000_000  # ns; within one tick of the disk's clock a second change has the same time as the first


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
        self.name = str(root / "objects")
        self.folder = root / "objects"
        self.temporaries = root / "tmp"
        disk.make_folders((self.folder, self.temporaries))
        self._prefixes: set[str] = set()
        self._verified: dict[str, tuple[int, int, int]] = {}

    def temporary(self) -> Path:
        """A fresh name in `tmp`."""
        return self.temporaries / uuid.uuid4().hex

    def place(self, file: File) -> Path:
        """Where a file's bytes lie on this machine, present or not."""
        return self.folder / file.digest[:2] / file.digest

    @contextmanager
    def writer(self) -> Iterator[disk.NewFile]:
        """An object to write piece by piece; it is stored when the block ends, and never was when the block fails.

        Raises:
            OSError: the disk refused; nothing half written has a final name.
        """
        with disk.new_file(self.temporary()) as new:
            yield new
        self._adopt(new.path, File(new.digest, new.size))

    def put(self, data: bytes) -> File:
        """Store bytes; putting what is there already is a no-op, and what is there damaged is replaced.

        Raises:
            OSError: the disk refused; nothing half written has a final name.
        """
        file = File(hashlib.sha256(data).hexdigest(), len(data))
        if self._is_whole(file):
            self._settle(file)
        else:
            with self.writer() as new:
                new.write(data)
        return file

    def put_file(self, path: Path) -> File:
        """Store a local file of any size, reading it once; errors as for `put`."""
        with self.writer() as new:
            for chunk in disk.chunks_of(path):
                new.write(chunk)
        return File(new.digest, new.size)

    def exists(self, file: File) -> bool:
        """Whether the object is kept, checked by name alone."""
        return self.place(file).exists()

    def path(self, file: File) -> Path:
        """A local path of an object whose size and SHA-256 have been checked, once per process and version on disk.

        Raises:
            Missing: the object is not there.
            Damaged: size or SHA-256 differ.
        """
        path = self.place(file)
        if self._verified.get(file.digest) != self._stamp(path):
            self._check(path, file)
        return path

    def verify(self, file: File) -> None:
        """Read an object and compare size and SHA-256, whatever was checked before; errors as for `path`."""
        self._check(self.place(file), file)

    def read(self, file: File) -> bytes:
        """The verified bytes of an object; errors as for `path`."""
        return self.path(file).read_bytes()

    def listing(self) -> Iterator[tuple[str, float]]:
        """The digest of every object that is kept, and when it was last put (seconds since 1970)."""
        for path in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):
                yield path.name, path.stat().st_mtime

    def delete(self, digest: str) -> None:
        """Remove an object; one that is gone already is no error."""
        path = self.folder / digest[:2] / digest
        with suppress(FileNotFoundError), disk.remedied(path):
            disk.unlink(path)

    def _adopt(self, temporary: Path, file: File) -> None:
        """Give a finished temporary its final name, in the place of what has it."""
        place = self.place(file)
        try:
            with disk.remedied(place):
                if not place.parent.is_dir():
                    disk.make_folder(place.parent)
                disk.rename(temporary, place)
        except OSError:
            with suppress(OSError):
                disk.unlink(temporary)
            raise
        self._settle(file)

    def _settle(self, file: File) -> None:
        """Make an object's name durable, and young again for the collector: it is about to be referenced."""
        place = self.place(file)
        with disk.remedied(place):
            with suppress(PermissionError):  # another user's object: the collector's grace counts from its own age
                os.utime(place)
            disk.sync_folder(place.parent)
            if place.parent.name not in self._prefixes:
                disk.sync_folder(self.folder)
                self._prefixes.add(place.parent.name)

    def _check(self, path: Path, file: File) -> None:
        stamp = self._stamp(path)
        self._check_size(path, file)
        try:
            with path.open("rb") as source:
                digest = hashlib.file_digest(source, "sha256").hexdigest()
        except OSError as error:
            raise Damaged(self._damage(str(path), f"it cannot be read: {error}")) from error
        if digest != file.digest:
            raise Damaged(self._damage(str(path), f"its SHA-256 is {digest}"))
        if time.time_ns() - stamp[0] > _TICK:
            self._verified[file.digest] = stamp

    def _is_whole(self, file: File) -> bool:
        """Whether the object is here, as it was put."""
        try:
            Objects.path(self, file)
        except (Missing, Damaged):
            return False
        return True

    def _check_size(self, path: Path, file: File) -> None:
        size = path.stat().st_size
        if size != file.size:
            raise Damaged(self._damage(str(path), f"it has {size} bytes, not {file.size}"))

    def _stamp(self, path: Path) -> tuple[int, int, int]:
        try:
            stat = path.stat()
        except FileNotFoundError as error:
            raise Missing(self._absence(str(path))) from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _absence(self, place: str) -> str:
        return f"object {place} is not in the store at {self.root}; restore it from a copy of the store"

    def _damage(self, place: str, what: str) -> str:
        return (
            f"object {place} of the store at {self.root} is damaged: {what}; "
            "restore it from a copy, or remove it and repeat the step that made it"
        )
