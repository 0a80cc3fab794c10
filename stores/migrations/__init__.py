"""How a catalog of an older schema becomes one of the newest: alembic, one file a version. The door to ``alembic``.

Opening a catalog of the newest schema does not come here, and so does not import alembic.
"""

from pathlib import Path

import sqlalchemy as sql
from alembic import command
from alembic.config import Config

VERSION_TABLE = "influent_alembic_version"
"""Alembic's count of versions: the name that other programs do not take in a database that they share with us."""


def migrate(connection: sql.Connection, found: int) -> None:
    """Bring a catalog to the newest schema, within the transaction of the connection.

    Args:
        connection: In a write transaction.
        found: The version that the catalog has; 0 for an empty database.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    if found == 1 and not sql.inspect(connection).has_table(VERSION_TABLE):
        command.stamp(config, "0001")  # version 1 was made before alembic kept the count
    command.upgrade(config, "head")
