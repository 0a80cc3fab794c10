"""Version 1: artifacts with their files, and belief counts."""

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables of version 1."""
    op.create_table("schema_version", sql.Column("version", sql.Integer, primary_key=True))
    op.create_table(
        "artifacts",
        sql.Column("key", sql.Text, primary_key=True),
        sql.Column("number", sql.Integer, nullable=False, unique=True),
        sql.Column("kind", sql.Text, nullable=False),
        sql.Column("meta", sql.Text, nullable=False),
        sql.Column("created_at", sql.Text, nullable=False),
    )
    op.create_table(
        "files",
        sql.Column("artifact", sql.Text, sql.ForeignKey("artifacts.key"), primary_key=True),
        sql.Column("name", sql.Text, primary_key=True),
        sql.Column("digest", sql.Text, nullable=False),
        sql.Column("size", sql.BigInteger, nullable=False),
    )
    op.create_table(
        "counts",
        sql.Column("batch", sql.Text, sql.ForeignKey("artifacts.key"), primary_key=True),
        sql.Column("prompt_uid", sql.Text, primary_key=True),
        sql.Column("position", sql.Integer, nullable=False),
        sql.Column("successes", sql.Integer, nullable=False),
        sql.Column("failures", sql.Integer, nullable=False),
    )
    op.execute("INSERT INTO schema_version (version) VALUES (1)")
