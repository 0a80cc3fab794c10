"""One store: objects, a catalog, and a view for each kind of thing that is kept."""

import hashlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stores import objects
from stores.canonical import canonical
from stores.catalog import Catalog
from stores.entries import Artifact, Count, check_names
from stores.errors import Conflict, Damaged, Missing
from stores.objects import File, Objects

if TYPE_CHECKING:
    from stores.beliefs import Beliefs
    from stores.checkpoints import Checkpoints
    from stores.curricula import Curricula
    from stores.gradients import Gradients
    from stores.tables import Tables
    from stores.trajectories import Trajectories

SCHEMA = 1
"""Part of every key: raised when what a step writes changes its meaning, so that old results are not taken for new."""

_NO_FILES: Mapping[str, bytes | Path] = MappingProxyType({})


class Store:
    """What steps share: they hand each other keys, and find here what the keys name.

    Args:
        root: The folder of the store.
        objects: Its files.
        catalog: Its commit point.
    """

    def __init__(self, root: Path, objects: Objects, catalog: Catalog) -> None:
        self.root = root
        self.objects = objects
        self.catalog = catalog

    @cached_property
    def trajectories(self) -> "Trajectories":
        """Shards of rollouts."""
        from stores.trajectories import Trajectories

        return Trajectories(self)

    @cached_property
    def gradients(self) -> "Gradients":
        """Generations of projected gradients."""
        from stores.gradients import Gradients

        return Gradients(self)

    @cached_property
    def checkpoints(self) -> "Checkpoints":
        """Policies, as folders."""
        from stores.checkpoints import Checkpoints

        return Checkpoints(self)

    @cached_property
    def curricula(self) -> "Curricula":
        """Selections with their stages, scores and reasons."""
        from stores.curricula import Curricula

        return Curricula(self)

    @cached_property
    def beliefs(self) -> "Beliefs":
        """Counts of successes and failures."""
        from stores.beliefs import Beliefs

        return Beliefs(self)

    @cached_property
    def tables(self) -> "Tables":
        """Any other columns."""
        from stores.tables import Tables

        return Tables(self)

    def key(self, step: str, **identity: Any) -> str:
        """The key of what a step makes: its name, and a digest of all that the result depends on.

        Args:
            step: Name of the step, in lower case letters, digits, dashes and underscores.
            identity: JSON-able values (tuples are lists); a change in any of them changes the key.

        Raises:
            ValueError: an entry has no JSON spelling, or the step is not such a name.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", step):
            raise ValueError(f"step is {step!r}; use up to 64 lower case letters, digits, dashes and underscores")
        for name, value in identity.items():
            canonical(value, name)  # so that an error names the entry as the caller does
        text = canonical({"step": step, "schema": SCHEMA, "identity": identity})
        return f"{step}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"

    def done(self, key: str) -> bool:
        """Whether the key names something that is committed."""
        return self.catalog.get(key) is not None

    def get(self, key: str) -> Artifact:
        """The artifact of a key.

        Raises:
            Missing: nothing is committed under the key.
        """
        artifact = self.catalog.get(key)
        if artifact is None:
            raise Missing(f"key {key!r} is not in the store at {self.root}; run the step that makes it")
        return artifact

    def meta(self, key: str) -> dict[str, Any]:
        """The facts recorded with a key; Missing as for `get`."""
        return self.get(key).meta

    def record(
        self,
        key: str,
        kind: str,
        meta: dict[str, Any],
        files: Mapping[str, bytes | Path] = _NO_FILES,
        counts: Sequence[Count] = (),
    ) -> str:
        """Keep files and commit them under a key, with facts and belief counts.

        Args:
            key: From `key`; recording the same content twice changes nothing.
            kind: What it is.
            meta: JSON-able facts.
            files: Bytes, or the path of a local file, by name.
            counts: (prompt_uid, successes, failures) to count with this batch.

        Returns:
            The key.

        Raises:
            Conflict: the key is taken by other content.
            OSError: the disk refused; nothing is committed.
        """
        check_names(key, files)
        stored = {name: self._put(data) for name, data in files.items()}
        self.catalog.commit(Artifact(key, kind, meta, stored), counts)
        # An object that was here before, unreferenced and old, may have been collected until the commit; not after it.
        for name, file in stored.items():
            if not self.objects.place(file).exists() and self._put(files[name]) != file:
                raise Conflict(f"file {name!r} of {key} changed while it was stored; repeat the step with a quiet file")
        return key

    def file(self, key: str, kind: str, name: str) -> Path:
        """The verified path of one file of an artifact.

        Raises:
            Missing: the key, the file or its object is not there.
            Damaged: the object is not what was stored.
            ValueError: the key names another kind.
        """
        return self.files(key, kind, name)[1][0]

    def files(self, key: str, kind: str, *names: str) -> tuple[Artifact, list[Path]]:
        """An artifact and the verified paths of some of its files, by one look-up; errors as for `file`."""
        artifact, paths = self.expect(key, kind), []
        for name in names:
            if name not in artifact.files:
                raise Missing(f"{kind} {key} has no file {name!r}; it has {sorted(artifact.files)}")
            try:
                paths.append(self.objects.path(artifact.files[name]))
            except Damaged as error:
                raise Damaged(f"{kind} {key}, file {name!r}: {error}") from error
        return artifact, paths

    def expect(self, key: str, kind: str) -> Artifact:
        """The artifact of a key that must be of a kind; errors as for `file`."""
        artifact = self.get(key)
        if artifact.kind != kind:
            raise ValueError(f"key {key!r} names {artifact.kind!r}, not {kind!r}; pass the key of a {kind!r}")
        return artifact

    def verify(self) -> Iterator[tuple[str, str, File, str | None]]:
        """Read every referenced object; yields (artifact key, file name, file, what is wrong or None)."""
        verdicts: dict[str, str | None] = {}
        for key, name, file in self.catalog.files():
            if file.digest not in verdicts:
                verdicts[file.digest] = self._wrong(file)
            yield key, name, file, verdicts[file.digest]

    def orphans(self) -> list[Path]:
        """Files among the objects that no artifact references: steps cut short leave them."""
        referenced = {file.digest for _, _, file in self.catalog.files()}
        return self._unreferenced(referenced)

    def collect(self, grace_seconds: float = 86400.0) -> int:
        """Delete the orphans and temporaries that are older than the grace period.

        Args:
            grace_seconds: Longer than any step takes from its first object to its commit.

        Returns:
            How many were deleted.
        """
        limit = time.time() - grace_seconds
        with self.catalog.exclusive() as referenced:
            candidates = [*self._unreferenced(referenced), *self.objects.temporaries.iterdir()]
            return sum(_delete_old(path, limit) for path in candidates)

    def _put(self, data: bytes | Path) -> File:
        return self.objects.put_file(data) if isinstance(data, Path) else self.objects.put(data)

    def _wrong(self, file: File) -> str | None:
        try:
            self.objects.verify(file)
        except (Damaged, Missing) as error:
            return str(error)
        return None

    def _unreferenced(self, referenced: set[str]) -> list[Path]:
        return sorted(path for path in self.objects.folder.glob("*/*") if path.name not in referenced)


def _delete_old(path: Path, limit: float) -> bool:
    try:
        if path.stat().st_mtime > limit:
            return False
        shutil.rmtree(path) if path.is_dir() else objects.unlink(path)
    except FileNotFoundError:  # a temporary that got its final name, or another collector's work
        return False
    return True
