"""Finished groups of rollouts whose shard is not complete yet: a killed collection loses only what was in flight.

One append-only file a shard, `<root>/spool/<key>.jsonl`: a line a group, with its SHA-256, synced before the next is
waited for. A line that was cut short by a kill, and all after a damaged one, count as not there: they are made again.
The file lies on this machine alone, also where the store is elsewhere.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stores import disk
from stores.parquet import Columns


class Spool:
    """The groups on disk, by the key of their shard.

    Args:
        root: The store's folder.
    """

    def __init__(self, root: Path) -> None:
        self.folder = root / "spool"

    def read(self, key: str) -> dict[str, dict[str, list[Any]]]:
        """The columns of the finished groups of a shard, by name of the group; what is not whole is cut off."""
        file = self.file(key)
        if not file.is_file():
            return {}
        found, data, whole = {}, file.read_bytes(), 0
        for line in data.splitlines(keepends=True):
            digest, _, text = line.partition(b" ")
            if not text.endswith(b"\n") or digest != _digest(text):
                break
            name, columns = json.loads(text)
            found[name] = columns
            whole += len(line)
        if whole < len(data):
            self._replace(file, data[:whole])
        return found

    def add(self, key: str, name: str, columns: Columns) -> None:
        """Append one finished group, durably.

        Args:
            key: Of the shard.
            name: Of the group; a later group of that name takes its place.
            columns: JSON-able values; a float is read back as it was.

        Raises:
            OSError: the disk refused; the groups before are still there.
        """
        text = json.dumps([name, {column: list(values) for column, values in columns.items()}]).encode() + b"\n"
        with self._opened(self.file(key)) as descriptor:
            disk.append(descriptor, _digest(text) + b" " + text)
            disk.sync(descriptor)

    def drop(self, key: str) -> None:
        """Forget a shard that is in the store."""
        with suppress(FileNotFoundError), disk.remedied(self.file(key)):
            disk.unlink(self.file(key))

    def file(self, key: str) -> Path:
        """Where the groups of a shard wait."""
        return self.folder / f"{key}.jsonl"

    @contextmanager
    def _opened(self, file: Path) -> Iterator[int]:
        disk.make_folders([self.folder])
        with disk.remedied(file):
            new = not file.exists()
            descriptor = disk.create(file, 0o644) if new else disk.reopen(file)
            try:
                if new:
                    disk.sync_folder(self.folder)
                yield descriptor
            finally:
                os.close(descriptor)

    def _replace(self, file: Path, data: bytes) -> None:
        temporary = file.with_suffix(".new")
        with suppress(FileNotFoundError):
            disk.unlink(temporary)
        disk.write_file(temporary, data, 0o644)
        with disk.remedied(file):
            disk.rename(temporary, file)
            disk.sync_folder(self.folder)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
