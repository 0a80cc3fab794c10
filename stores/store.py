"""One store: objects, a catalog, and a view for each kind of thing that is kept."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from stores import seals
from stores.canonical import canonical
from stores.catalog import Catalog
from stores.entries import Artifact, Count, Key, Lease, check_names
from stores.errors import Damaged, Missing
from stores.leases import Leases
from stores.objects import File, Objects

if TYPE_CHECKING:
    from stores.beliefs import Beliefs
    from stores.checkpoints import Checkpoints
    from stores.curricula import Curricula
    from stores.gradients import Gradients
    from stores.spool import Spool
    from stores.tables import Tables
    from stores.trajectories import Trajectories

SCHEMA = 1
"""Part of every key: raised when what a step writes changes its meaning, so that old results are not taken for new."""

_NO_FILES: Mapping[str, bytes | Path | File] = MappingProxyType({})


class Store:
    """What steps share: they hand each other keys, and find here what the keys name.

    Args:
        root: The folder of the store.
        objects: Its files.
        catalog: Its commit point.

    Attributes:
        origin: Recorded with each artifact that is committed through here: `code`, `settings` and the like.
        lease: What this process holds: without it, once somebody has taken it over, nothing is committed.
    """

    def __init__(self, root: Path, objects: Objects, catalog: Catalog) -> None:
        self.root = root
        self.objects = objects
        self.catalog = catalog
        self.origin: dict[str, str] = {}
        self.lease: Lease | None = None

    @cached_property
    def trajectories(self) -> "Trajectories":
        """Shards of rollouts."""
        from stores.trajectories import Trajectories

        return Trajectories(self)

    @cached_property
    def spool(self) -> "Spool":
        """Groups of rollouts that wait for the rest of their shard."""
        from stores.spool import Spool

        return Spool(self.root)

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

    @cached_property
    def leases(self) -> Leases:
        """Who may commit under which name."""
        return Leases(self.catalog.database)

    @contextmanager
    def hold(self, name: str, seconds: float = 60.0, *, patience: float = 0.0) -> Iterator[Lease]:
        """Hold a lease while the block runs: what this store commits meanwhile is refused once somebody took it over.

        Raises:
            Fenced: somebody else holds it, and goes on for longer than `patience` seconds.
        """
        with self.leases.hold(name, seconds, patience=patience) as lease:
            before, self.lease = self.lease, lease
            try:
                yield lease
            finally:
                self.lease = before

    def key(self, step: str, **identity: Any) -> str:
        """The key of what a step makes: its name, and a digest of all that the result depends on.

        Args:
            step: Name of the step, in lower case letters, digits, dashes and underscores.
            identity: JSON-able values (tuples are lists), or `Spelled`; a change in any of them changes the key. The
                key remembers them, so that they are recorded with the artifact; keys among them are its inputs.

        Raises:
            ValueError: an entry has no JSON spelling, or the step is not such a name.
        """
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", step):
            raise ValueError(f"step is {step!r}; use up to 64 lower case letters, digits, dashes and underscores")
        texts = {name: canonical(value, name) for name, value in identity.items()}  # an error names the entry
        entries = ",".join(f"{canonical(name)}:{texts[name]}" for name in sorted(texts))
        text = f'{{"identity":{{{entries}}},"schema":{canonical(SCHEMA)},"step":{canonical(step)}}}'
        return Key(f"{step}-{seals.of_text(text)[:24]}", identity)

    def done(self, key: str) -> bool:
        """Whether the key names something that is committed."""
        return self.catalog.get(key) is not None

    def get(self, key: str) -> Artifact:
        """The artifact of a key.

        Raises:
            Missing: nothing is committed under the key.
            Damaged: the catalog's rows are not what was committed.
        """
        artifact = self.catalog.get(key)
        if artifact is None:
            raise Missing(f"key {key!r} is not in the store at {self.root}; run the step that makes it")
        return artifact

    def meta(self, key: str) -> dict[str, Any]:
        """The facts recorded with a key; errors as for `get`."""
        return self.get(key).meta

    def record(
        self,
        key: str,
        kind: str,
        meta: dict[str, Any],
        files: Mapping[str, bytes | Path | File] = _NO_FILES,
        counts: Sequence[Count] = (),
    ) -> str:
        """Keep files and commit them under a key, with facts and belief counts.

        Args:
            key: From `key`; recording the same content twice changes nothing.
            kind: What it is.
            meta: JSON-able facts.
            files: Bytes, the path of a local file, or an object that was just written, by name.
            counts: (prompt_uid, successes, failures) to count with this batch.

        Returns:
            The key.

        Raises:
            Conflict: the key is taken by other content.
            Fenced: the lease of this store was taken over.
            OSError: the disk refused; nothing is committed.
        """
        check_names(key, files)
        identity = key.identity if isinstance(key, Key) else None
        for attempt in ("first", "last"):
            stored = {name: self._put(data) for name, data in files.items()}
            try:
                self.commit(Artifact(key, kind, meta, stored, identity, origin=self.origin), counts)
            except Missing:  # an old orphan of the same bytes, collected since it was put: put it again, once
                if attempt == "last" or any(isinstance(data, File) for data in files.values()):
                    raise
            else:
                break
        return key

    def commit(self, artifact: Artifact, counts: Sequence[Count] = ()) -> Artifact:
        """Commit an artifact whose files were put, under the lease of this store, if it holds one.

        Raises:
            Missing: a file was collected between its put and now; nothing is committed.
            Conflict, Fenced: as for `record`.
        """

        def check() -> None:
            for name, file in artifact.files.items():
                if not self.objects.exists(file):
                    raise Missing(
                        f"file {name!r} of {artifact.key} was collected before its commit; repeat the step, and give "
                        "the collector a grace period that is longer than it takes"
                    )

        return self.catalog.commit(artifact, counts, self.lease, check)

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

    def _put(self, data: bytes | Path | File) -> File:
        if isinstance(data, File):
            return data
        return self.objects.put_file(data) if isinstance(data, Path) else self.objects.put(data)
