"""Lineage: what an artifact was made from, back to what was made from nothing.

A key is the digest of all that its artifact depends on, and that identity is recorded with it: settings, seeds, and
the keys of other artifacts, whose identities are recorded in turn.
"""

from typing import Any

from stores.errors import Missing
from stores.store import Store


def lineage(store: Store, key: str) -> dict[str, dict[str, Any]]:
    """Everything that an artifact depends on, itself first.

    Args:
        store: Where it is.
        key: Its key.

    Returns:
        By key: `kind`, `identity` (settings, seeds and keys; long entries by their SHA-256; None for an artifact of a
        version that did not record it), `inputs` (keys), `files` (SHA-256 by name) and `origin` (code version and key
        of the settings, of the process that made it). An input that has been collected has `kind` None.

    Raises:
        Missing: the key is not in the store.
    """
    found: dict[str, dict[str, Any]] = {}
    waiting = [key]
    while waiting:
        this = waiting.pop(0)
        if this not in found:
            found[this] = _facts(store, this, needed=this == key)
            waiting += found[this]["inputs"]
    return found


def _facts(store: Store, key: str, needed: bool) -> dict[str, Any]:
    try:
        artifact = store.get(key)
    except Missing:
        if needed:
            raise
        return {"kind": None, "identity": None, "inputs": [], "files": {}, "origin": {}}
    return {
        "kind": artifact.kind,
        "identity": artifact.identity,
        "inputs": list(artifact.inputs),
        "files": {name: file.digest for name, file in artifact.files.items()},
        "origin": dict(artifact.origin),
    }
