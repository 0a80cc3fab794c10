"""What Influent keeps: arrays, tables, keys and manifests. It does not know what a gradient is.

Payload is immutable, content-addressed files, durable before the one SQL commit that makes them visible. Steps hand
each other keys; `open_store` opens what the keys name.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from stores.errors import Conflict, Damaged, Missing, StoreError

if TYPE_CHECKING:
    from stores.store import Store

__all__ = ["Conflict", "Damaged", "Missing", "StoreError", "open_store"]


def open_store(root: Path, catalog_url: str | None = None) -> "Store":
    """Open a store, making it when it is not there.

    Args:
        root: Its folder, on a local disk.
        catalog_url: SQLAlchemy URL of its catalog; by default SQLite in `<root>/catalog.sqlite`.

    Raises:
        StoreError: the catalog cannot be opened, or a newer version wrote it.
    """
    from stores.catalog import Catalog, sqlite_url
    from stores.objects import Objects
    from stores.store import Store

    root = Path(root).absolute()
    objects = Objects(root)
    return Store(root, objects, Catalog(catalog_url or sqlite_url(root / "catalog.sqlite")))
