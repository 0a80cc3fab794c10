"""The SQL catalog: the only commit point of a store.

An artifact is visible when its row is, together with the rows of its files and of its belief counts: one transaction.
What is read is compared with the seals that were written with it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import sqlalchemy as sql

from stores import rows, schema, seals
from stores.canonical import canonical
from stores.database import Database
from stores.entries import Artifact, Count, Lease, check_counts, check_names, differences
from stores.errors import Conflict, Damaged, Missing
from stores.leases import check_fence
from stores.objects import File

_BATCHES = 16  # whose counts are in memory at a time


class Catalog:
    """Artifacts and belief counts in one database.

    Args:
        database: Where they are.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.name = database.name

    def get(self, key: str, retired: bool = False) -> Artifact | None:
        """The artifact of a key, or None; a retired one on request.

        Raises:
            Damaged: the catalog's rows are not what was committed.
        """
        with self.database.transaction() as connection:
            row = rows.find(connection, key)
            hidden = row is None or (row.retired_at is not None and not retired)
            return None if hidden else self._artifact(connection, row)

    def commit(
        self,
        artifact: Artifact,
        counts: Sequence[Count] = (),
        lease: Lease | None = None,
        check: Callable[[], None] | None = None,
    ) -> Artifact:
        """Make an artifact visible, with its files and belief counts, in one transaction.

        Args:
            artifact: What to commit; its files must be durable already.
            counts: (prompt_uid, successes, failures), a prompt at most once, in the order to keep.
            lease: What the committing process holds; a lease that somebody else has taken over is refused.
            check: Called while nothing can be collected; what it raises stops the commit.

        Returns:
            The stored artifact. The same key with the same content, however long it took to make, is a no-op, and takes
            back a retirement.

        Raises:
            Conflict: the key is taken by other content; the message says what differs.
            Fenced: the lease is no longer held.
            ValueError: an unusable key or file name, meta without JSON spelling, or counts that do not count.
        """
        check_names(artifact.key, artifact.files)
        check_counts(counts)
        canonical(artifact.meta, "meta")
        with self.database.transaction(write=True) as connection:
            if lease is not None:
                check_fence(connection, lease)
            if check is not None:
                check()
            row = rows.find(connection, artifact.key)
            if row is None:
                rows.insert(connection, artifact, counts)
                return self._artifact(connection, rows.find(connection, artifact.key))
            stored = self._artifact(connection, row)
            found = differences(stored, artifact)
            if row.counts != seals.of_counts(counts):
                found.append("counts")
            if found:
                raise Conflict(
                    f"key {artifact.key} is in the catalog {self.name} with another {', another '.join(found)}; "
                    "put whatever differs into the identity that the key is made of"
                )
            if row.retired_at is not None:
                rows.retire(connection, artifact.key, None)
            return stored

    def keys(self, kind: str | None = None) -> list[str]:
        """The keys of a kind, or of all kinds, in the order of their commits; Damaged where some have vanished."""
        columns = (schema.artifacts.c.key, schema.artifacts.c.kind, schema.artifacts.c.retired_at)
        with self.database.transaction() as connection:
            found = connection.execute(sql.select(*columns).order_by(schema.artifacts.c.number)).all()
            expected = rows.head(connection, "artifacts")
        if len(found) != expected:
            raise Damaged(self._vanished(len(found), expected))
        return [row.key for row in found if row.retired_at is None and kind in (None, row.kind)]

    def counts(self, batches: Sequence[str]) -> list[tuple[str, str, int, int]]:
        """The counts (batch, prompt_uid, successes, failures) of some batches.

        Args:
            batches: Keys of artifacts; one listed twice is read once, at its first place.

        Returns:
            Rows in the order of `batches`, and within a batch in the order of its commit.

        Raises:
            Missing: a batch is not in the catalog.
            Damaged: the rows are not what was committed.
        """
        return [(batch, *count) for batch, counts in self.scan_counts(batches) for count in counts]

    def scan_counts(self, batches: Sequence[str]) -> Iterator[tuple[str, list[Count]]]:
        """The same a batch at a time, with few of them in memory; what is committed under a key never changes."""
        table = schema.artifacts.c
        for chunk in rows.chunks(list(dict.fromkeys(batches)), _BATCHES):
            with self.database.transaction() as connection:
                known = dict(connection.execute(sql.select(table.key, table.counts).where(table.key.in_(chunk))).all())
                counted = rows.read_counts(connection, chunk)
            for batch in chunk:
                if batch not in known:
                    raise Missing(f"batch {batch!r} is not in the catalog {self.name}; commit it first")
                if not seals.match(known[batch], counted[batch]):
                    raise Damaged(self._broken(f"the counts of {batch} are not what was committed"))
                yield batch, counted.pop(batch)

    def files(self) -> list[tuple[str, str, File]]:
        """Every (artifact key, file name, file), artifacts in the order of their commits, files by name.

        Raises:
            Damaged: a row is not what was committed, or has vanished.
        """
        with self.database.transaction() as connection:
            return self._files(connection)

    def retire(self, key: str) -> None:
        """Hide an artifact; the collector removes it, and the files that nothing else names, after its grace period.

        Raises:
            Missing: there is no such artifact.
            ValueError: beliefs rest on it.
        """
        with self.database.transaction(write=True) as connection:
            row = rows.find(connection, key)
            if row is None:
                raise Missing(f"key {key!r} is not in the catalog {self.name}; nothing is to be retired")
            if row.counts != seals.of_counts(()):
                raise ValueError(f"key {key!r} has belief counts, and beliefs lose nothing; retire what has none")
            if row.retired_at is None:
                self._artifact(connection, row)
                rows.retire(connection, key, time.time())

    @contextmanager
    def exclusive(self) -> Iterator[set[str]]:
        """Hold all commits back; gives the digests that some artifact references.

        Raises:
            Damaged: a row is not what was committed, or has vanished: what it referenced is then not known.
        """
        with self.database.transaction(write=True) as connection:
            yield {file.digest for _, _, file in self._files(connection)}

    def remove_retired(self, before: float) -> list[str]:
        """Remove the artifacts that were retired before a moment (seconds since 1970), unless their key is leased.

        Returns:
            Their keys.

        Raises:
            Damaged: a row is not what was committed, or has vanished.
        """
        with self.database.transaction(write=True) as connection:
            self._files(connection)  # nothing is removed on the word of a damaged row
            return rows.remove_retired(connection, before, time.time())

    def sound_files(self) -> list[tuple[str, str, File]]:
        """As `files`, of the artifacts in use whose rows are what was committed; `problems` names the others."""
        found = []
        with self.database.transaction() as connection:
            for row, files, inputs in rows.read_all(connection):
                with suppress(Damaged):
                    artifact = rows.checked(row, files, inputs)
                    if row.retired_at is None:
                        found += [(artifact.key, name, file) for name, file in artifact.files.items()]
        return found

    def problems(self) -> list[str]:
        """Everything that is wrong with the catalog itself: pages, seals, counts, vanished artifacts."""
        found = self.database.problems()
        with self.database.transaction() as connection:
            listed = list(rows.read_all(connection))
            for row, files, inputs in listed:
                try:
                    rows.checked(row, files, inputs)
                except Damaged as error:
                    found.append(self._broken(str(error)))
                if not seals.match(row.counts, rows.read_counts(connection, [row.key])[row.key]):
                    found.append(self._broken(f"the counts of {row.key} are not what was committed"))
            expected = rows.head(connection, "artifacts")
        return found + ([self._vanished(len(listed), expected)] if len(listed) != expected else [])

    def _files(self, connection: sql.Connection) -> list[tuple[str, str, File]]:
        try:
            artifacts = [rows.checked(*one) for one in rows.read_all(connection)]
        except Damaged as error:
            raise Damaged(self._broken(str(error))) from error
        if len(artifacts) != (expected := rows.head(connection, "artifacts")):
            raise Damaged(self._vanished(len(artifacts), expected))
        return [(artifact.key, name, file) for artifact in artifacts for name, file in artifact.files.items()]

    def _artifact(self, connection: sql.Connection, row: Any) -> Artifact:
        try:
            return rows.read(connection, row)
        except Damaged as error:
            raise Damaged(self._broken(str(error))) from error

    def _vanished(self, found: int, expected: int) -> str:
        return self._broken(f"it lists {found} artifacts of {expected}")

    def _broken(self, what: str) -> str:
        return f"catalog {self.name}: {what}; restore it from a copy"
