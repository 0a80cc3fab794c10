"""Finished groups of shards that are not complete yet, so that a killed collection loses only what was in flight.

One append-only file a shard, beside the objects of the store: a line a group, with a checksum, synced before the next
group is waited for. A line that was cut short by a kill, and all after a damaged one, count as not there.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

from pipeline.records import Rollouts


class Spool:
    """The groups on disk, by the key of their shard.

    Args:
        folder: where the files are; made when the first group is added.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, key: str) -> dict[str, Rollouts]:
        """Return the finished groups of a shard by prompt_uid, and cut off what is not whole behind them."""
        file, found, whole = self._file(key), dict[str, Rollouts](), 0
        if not file.is_file():
            return found
        data = file.read_bytes()
        for line in data.splitlines(keepends=True):
            check, _, text = line.partition(b" ")
            if not text.endswith(b"\n") or check != _checksum(text):
                break
            group = Rollouts.of(json.loads(text))
            found[group.prompt_uid[0]] = group
            whole += len(line)
        if whole < len(data):
            os.truncate(file, whole)
        return found

    def add(self, key: str, group: Rollouts) -> None:
        """Append one finished group, durably."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(group.columns(), separators=(",", ":")).encode() + b"\n"  # a float is read back as it was
        new = not self._file(key).exists()
        with self._file(key).open("ab") as file:
            file.write(_checksum(text) + b" " + text)
            file.flush()
            os.fsync(file.fileno())
        if new:
            _sync_folder(self.folder)

    def drop(self, key: str) -> None:
        """Forget a shard that is in the store."""
        self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.jsonl"


def _checksum(text: bytes) -> bytes:
    return b"%08x" % zlib.crc32(text)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
