"""Version 2: leases; what an artifact was made from and by; seals over what was committed, and a count of artifacts."""

import sqlalchemy as sql
from alembic import op

from stores import seals

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add tables and columns, and seal what is there."""
    for name in ("identity", "origin", "counts", "seal"):
        op.add_column("artifacts", sql.Column(name, sql.Text, nullable=False, server_default=""))
    op.add_column("artifacts", sql.Column("retired_at", sql.Float))
    op.create_table(
        "inputs",
        sql.Column("artifact", sql.Text, sql.ForeignKey("artifacts.key"), primary_key=True),
        sql.Column("input", sql.Text, primary_key=True, index=True),
    )
    op.create_table(
        "leases",
        sql.Column("name", sql.Text, primary_key=True),
        sql.Column("owner", sql.Text, nullable=False),
        sql.Column("fence", sql.BigInteger, nullable=False),
        sql.Column("acquired_at", sql.Float, nullable=False),
        sql.Column("expires_at", sql.Float, nullable=False),
    )
    op.create_table(
        "head", sql.Column("name", sql.Text, primary_key=True), sql.Column("value", sql.BigInteger, nullable=False)
    )
    connection = op.get_bind()
    artifacts = connection.execute(sql.text("SELECT * FROM artifacts")).mappings().all()
    for row in artifacts:
        key = {"key": row["key"]}
        files = connection.execute(sql.text("SELECT name, digest, size FROM files WHERE artifact = :key"), key).all()
        counts = connection.execute(
            sql.text("SELECT prompt_uid, successes, failures FROM counts WHERE batch = :key ORDER BY position"), key
        ).all()
        sealed = dict(row) | {"retired_at": None, "counts": seals.of_counts([(uid, s, f) for uid, s, f in counts])}
        sealed["seal"] = seals.of_entry(sealed, [(name, digest, size) for name, digest, size in files], [])
        connection.execute(
            sql.text("UPDATE artifacts SET counts = :counts, seal = :seal WHERE key = :key"),
            key | {"counts": sealed["counts"], "seal": sealed["seal"]},
        )
    last = max((row["number"] for row in artifacts), default=0)
    for name, value in (("artifacts", len(artifacts)), ("commits", last)):
        connection.execute(sql.text("INSERT INTO head VALUES (:name, :value)"), {"name": name, "value": value})
    op.execute("UPDATE schema_version SET version = 2")
