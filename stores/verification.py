"""The full scan: every file that the catalog references is read and compared, and the catalog itself is checked."""

from collections.abc import Iterator
from dataclasses import dataclass

from stores.errors import Damaged, Missing
from stores.objects import File
from stores.store import Store


@dataclass(frozen=True)
class Verdict:
    """What was found of one file of one artifact, or, without a file, of the catalog.

    Attributes:
        key: The artifact; empty for the catalog.
        name: The file's name in it.
        file: Its digest and size; None for the catalog.
        read: Bytes that were read for this verdict; 0 where another artifact has the same file.
        wrong: What is wrong; None where all is right.
    """

    key: str
    name: str
    file: File | None
    read: int
    wrong: str | None


def verify(store: Store) -> Iterator[Verdict]:
    """Check the catalog, then read every referenced object; a verdict a file, and one a problem of the catalog."""
    for problem in store.catalog.problems():
        yield Verdict("", "", None, 0, problem)
    found: dict[str, str | None] = {}
    for key, name, file in store.catalog.sound_files():
        new = file.digest not in found
        if new:
            found[file.digest] = _wrong(store, file)
        yield Verdict(key, name, file, file.size if new else 0, found[file.digest])


def _wrong(store: Store, file: File) -> str | None:
    try:
        store.objects.verify(file)
    except (Damaged, Missing) as error:
        return str(error)
    return None
