"""What Influent keeps: arrays, tables, keys and manifests. It does not know what a gradient is.

Payload is immutable, content-addressed files, durable before the one SQL commit that makes them visible. Steps hand
each other keys; `open_store` opens what the keys name.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from stores.errors import Conflict, Damaged, Fenced, Missing, StoreError

if TYPE_CHECKING:
    from stores.store import Store

__all__ = ["Conflict", "Damaged", "Fenced", "Missing", "StoreError", "open_store"]


def open_store(root: Path, catalog_url: str | None = None, objects_url: str | None = None) -> "Store":
    """Open a store, making it when it is not there.

    Args:
        root: Its folder, on a local disk: all of it, or the cache of what lies elsewhere.
        catalog_url: SQLAlchemy URL of its catalog; by default SQLite in `<root>/catalog.sqlite`.
        objects_url: Where its files are, such as `s3://bucket/influent`; by default `<root>/objects`.

    Raises:
        StoreError: the catalog or the bucket cannot be reached, or a newer version wrote it.
        Damaged: the catalog is not a database.
    """
    from stores.catalog import Catalog
    from stores.database import Database, sqlite_url
    from stores.objects import Objects
    from stores.store import Store

    root = Path(root).absolute()
    if objects_url:
        from stores.remote import RemoteObjects

        objects: Objects = RemoteObjects(root, objects_url)
    else:
        objects = Objects(root)
    return Store(root, objects, Catalog(Database(catalog_url or sqlite_url(root / "catalog.sqlite"))))
