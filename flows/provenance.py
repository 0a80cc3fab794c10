"""Which code made a result: the version of the package, and a digest of its sources."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("pipeline", "stores", "flows")


@cache
def code_version() -> str:
    """Return ``<version>+<digest>``: two checkouts, or an edited and a released one, differ in the digest."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{package}/{file.relative_to(folder)}\0".encode() + file.read_bytes() + b"\0")
    return f"{version('influent')}+{digest.hexdigest()[:12]}"
