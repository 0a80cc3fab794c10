"""The tables of the catalog, as the newest version has them; `migrations` brings older ones here."""

import sqlalchemy as sql

VERSION = 2

tables = sql.MetaData()
version = sql.Table("schema_version", tables, sql.Column("version", sql.Integer, primary_key=True))
artifacts = sql.Table(
    "artifacts",
    tables,
    sql.Column("key", sql.Text, primary_key=True),
    sql.Column("number", sql.Integer, nullable=False, unique=True),  # the order of commits
    sql.Column("kind", sql.Text, nullable=False),
    sql.Column("meta", sql.Text, nullable=False),
    sql.Column("created_at", sql.Text, nullable=False),
    sql.Column("identity", sql.Text, nullable=False),  # what the key is the digest of; empty where it is not known
    sql.Column("origin", sql.Text, nullable=False),  # code version and settings of the process that committed it
    sql.Column("counts", sql.Text, nullable=False),  # SHA-256 of its rows of `counts`
    sql.Column("retired_at", sql.Float),  # seconds since 1970; None while it is in use
    sql.Column("seal", sql.Text, nullable=False),  # SHA-256 of all of the above, of its files and inputs
)
files = sql.Table(
    "files",
    tables,
    sql.Column("artifact", sql.ForeignKey("artifacts.key"), primary_key=True),
    sql.Column("name", sql.Text, primary_key=True),
    sql.Column("digest", sql.Text, nullable=False),
    sql.Column("size", sql.BigInteger, nullable=False),
)
inputs = sql.Table(
    "inputs",
    tables,
    sql.Column("artifact", sql.ForeignKey("artifacts.key"), primary_key=True),
    sql.Column("input", sql.Text, primary_key=True, index=True),  # a key that the artifact's identity names
)
counts = sql.Table(
    "counts",
    tables,
    sql.Column("batch", sql.ForeignKey("artifacts.key"), primary_key=True),
    sql.Column("prompt_uid", sql.Text, primary_key=True),
    sql.Column("position", sql.Integer, nullable=False),
    sql.Column("successes", sql.Integer, nullable=False),
    sql.Column("failures", sql.Integer, nullable=False),
)
leases = sql.Table(
    "leases",
    tables,
    sql.Column("name", sql.Text, primary_key=True),
    sql.Column("owner", sql.Text, nullable=False),
    sql.Column("fence", sql.BigInteger, nullable=False),  # one more at each change of owner
    sql.Column("acquired_at", sql.Float, nullable=False),
    sql.Column("expires_at", sql.Float, nullable=False),
)
head = sql.Table(
    "head",
    tables,
    sql.Column("name", sql.Text, primary_key=True),
    sql.Column("value", sql.BigInteger, nullable=False),  # `artifacts`: how many there are; `commits`: how many ever
)
