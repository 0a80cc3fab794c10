"""The disk: eight operations, through which everything that a store writes itself goes, and what is built from them.

Because there are no others, a test can fail each of them, record them all, or lose what was not synced. (A database
does its own writing, with its own promises.)
"""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_REMEDIES = {
    errno.ENOSPC: "free some space on that disk and repeat the step",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f) and repeat the step",
    errno.EDQUOT: "raise the quota or free some space and repeat the step",
    errno.EACCES: "make the folder writable and repeat the step",
    errno.EROFS: "choose a folder on a writable disk and repeat the step",
}
_CHUNK = 1 << 20


# ---- the eight operations -----------------------------------------------------------------------------------------


def create(path: Path, mode: int = 0o444) -> int:
    """Create a file that must not exist; returns a descriptor that can be written whatever the mode."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)


def reopen(path: Path) -> int:
    """Open a file that is there, to write at its end."""
    return os.open(path, os.O_WRONLY | os.O_APPEND)


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


def make_folder(path: Path) -> None:
    """Create one folder; one that is there is left alone."""
    with suppress(FileExistsError):
        os.mkdir(path)


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


class NewFile:
    """A file being written: takes bytes, and knows the SHA-256 and the size of what it took.

    It has what pyarrow asks of a sink: `write`, `flush`, `close`, `closed`. `finish` makes the content durable.

    Args:
        path: A name that is free.
        mode: Its rights.
    """

    def __init__(self, path: Path, mode: int = 0o444) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._descriptor: int | None = create(path, mode)

    @property
    def digest(self) -> str:
        """The SHA-256 of what was written, in hexadecimal."""
        return self._digest.hexdigest()

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._descriptor is None

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; returns how many."""
        assert self._descriptor is not None, "a finished file takes no more"
        view = memoryview(data).cast("B")
        append(self._descriptor, view)
        self._digest.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: `finish` is what counts."""

    def close(self) -> None:
        """Close the file as it is."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def finish(self) -> None:
        """Wait until the content is on the disk, and close."""
        assert self._descriptor is not None, "a file is finished once"
        sync(self._descriptor)
        self.close()


@contextmanager
def new_file(path: Path, mode: int = 0o444) -> Iterator[NewFile]:
    """A new file that is on the disk when the block ends, and gone when the block fails.

    Raises:
        OSError: with the errno of the failure, the path and the remedy.
    """
    with remedied(path):
        file = NewFile(path, mode)
        try:
            yield file
            file.finish()
        except BaseException:
            file.close()
            with suppress(OSError):
                unlink(path)
            raise


def write_file(path: Path, data: bytes, mode: int = 0o444) -> None:
    """Write a new file and wait until it is on the disk; a failed write leaves no file; errors as for `new_file`."""
    with new_file(path, mode) as file:
        file.write(data)


def chunks_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file, 1 MiB at a time."""
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK):
            yield chunk


def make_folders(paths: Iterable[Path]) -> None:
    """Create folders with the folders that they lie in, each name durable.

    Raises:
        OSError: with the errno of the failure, the path and the remedy.
    """
    for path in paths:
        with remedied(path):
            absent = [folder for folder in (path, *path.parents) if not folder.is_dir()]
            for folder in reversed(absent):
                make_folder(folder)
                sync_folder(folder.parent)


@contextmanager
def remedied(path: Path) -> Iterator[None]:
    """Re-raise an OSError with the path and the remedy in its message, keeping its errno."""
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk and repeat the step")
        message = f"{error.strerror or error} while writing {path}; nothing was committed: {remedy}"
        raise OSError(error.errno or errno.EIO, message) from error
