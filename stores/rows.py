"""Rows of the catalog: how an artifact becomes rows of several tables, and is read back from them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sql

from stores import schema, seals
from stores.canonical import Spelled, canonical
from stores.entries import Artifact, Count
from stores.errors import Damaged
from stores.objects import File

_MANY = 500  # keys in one IN list: every database takes that many
_LONG = 4096  # characters of one entry of an identity that are kept; of a longer one, its SHA-256
_KEY = re.compile(r"[a-z][a-z0-9_-]{0,63}-[0-9a-f]{24}")


def find(connection: sql.Connection, key: str) -> Any:
    """The row of an artifact, retired or not, or None; what the index does not find is looked for without it."""
    table = schema.artifacts
    found = connection.execute(sql.select(table).where(table.c.key == key)).first()
    return found or connection.execute(sql.select(table).where(table.c.key + "" == key)).first()


def read(connection: sql.Connection, row: Any) -> Artifact:
    """The artifact of a row.

    Raises:
        Damaged: the rows are not what was committed.
    """
    files = connection.execute(sql.select(schema.files).where(schema.files.c.artifact == row.key)).all()
    inputs = connection.scalars(sql.select(schema.inputs.c.input).where(schema.inputs.c.artifact == row.key)).all()
    return checked(row, files, list(inputs))


def read_all(connection: sql.Connection) -> Iterator[tuple[Any, list[Any], list[str]]]:
    """Every artifact, retired or not, as its rows for `checked`, in the order of their commits."""
    files: dict[str, list[Any]] = {}
    inputs: dict[str, list[str]] = {}
    for file in connection.execute(sql.select(schema.files)):
        files.setdefault(file.artifact, []).append(file)
    for edge in connection.execute(sql.select(schema.inputs)):
        inputs.setdefault(edge.artifact, []).append(edge.input)
    for row in connection.execute(sql.select(schema.artifacts).order_by(schema.artifacts.c.number)).all():
        yield row, files.get(row.key, []), inputs.get(row.key, [])


def checked(row: Any, files: Sequence[Any], inputs: Sequence[str]) -> Artifact:
    """The artifact of its rows.

    Raises:
        Damaged: they are not what was committed.
    """
    by_name = {file.name: File(file.digest, file.size) for file in files}
    try:
        whole = row.seal == _seal(row._mapping, by_name, inputs)
    except (ValueError, TypeError):  # a value of another type
        whole = False
    if not whole:
        raise Damaged(f"the entry of {row.key} is not what was committed")
    return Artifact(
        row.key,
        row.kind,
        json.loads(row.meta),
        {name: by_name[name] for name in sorted(by_name)},
        identity=json.loads(row.identity) if row.identity else None,
        inputs=tuple(sorted(inputs)),
        origin=json.loads(row.origin) if row.origin else {},
        created_at=row.created_at,
    )


def insert(connection: sql.Connection, artifact: Artifact, counts: Sequence[Count]) -> None:
    """Write an artifact that is not there, with its files, inputs and belief counts."""
    number = head(connection, "commits") + 1
    inputs = sorted(keys_in(artifact.identity).union(artifact.inputs))
    row = {
        "key": artifact.key,
        "number": number,
        "kind": artifact.kind,
        "meta": canonical(artifact.meta),
        "created_at": artifact.created_at or datetime.now(UTC).isoformat(timespec="seconds"),
        "identity": _spelled(artifact.identity),
        "origin": canonical(artifact.origin) if artifact.origin else "",
        "counts": seals.of_counts(counts),
        "retired_at": None,
    }
    connection.execute(schema.artifacts.insert(), row | {"seal": _seal(row, artifact.files, inputs)})
    for table, values in (
        (schema.files, [(artifact.key, name, file.digest, file.size) for name, file in artifact.files.items()]),
        (schema.inputs, [(artifact.key, key) for key in inputs]),
        (schema.counts, [(artifact.key, uid, place, *count) for place, (uid, *count) in enumerate(counts)]),
    ):
        if values:
            names = table.c.keys()
            connection.execute(table.insert(), [dict(zip(names, each, strict=True)) for each in values])
    set_head(connection, artifacts=head(connection, "artifacts") + 1, commits=number)


def keys_in(value: Any) -> set[str]:
    """The keys of artifacts among the strings of a JSON value, as `Store.key` spells them."""
    if isinstance(value, str):
        return {value} if _KEY.fullmatch(value) else set()
    if isinstance(value, Mapping):
        return set().union(*(keys_in(item) for item in value.values()))
    if isinstance(value, list | tuple):
        return set().union(*(keys_in(item) for item in value))
    return set()


def read_counts(connection: sql.Connection, batches: Sequence[str]) -> dict[str, list[Count]]:
    """The counts of each batch, in the order of its commit."""
    found: dict[str, list[Count]] = {batch: [] for batch in batches}
    table = schema.counts.c
    query = sql.select(table.batch, table.prompt_uid, table.successes, table.failures).order_by(table.position)
    for chunk in chunks(batches):
        for row in connection.execute(query.where(table.batch.in_(chunk))):
            found.setdefault(row.batch, []).append((row.prompt_uid, row.successes, row.failures))
    return found


def retire(connection: sql.Connection, key: str, moment: float | None) -> None:
    """Note when an artifact was retired, or with None that it is in use, under a new seal."""
    row, table = find(connection, key), schema.artifacts
    artifact = read(connection, row)
    seal = _seal({**row._mapping, "retired_at": moment}, artifact.files, artifact.inputs)
    connection.execute(table.update().where(table.c.key == key).values(retired_at=moment, seal=seal))


def remove_retired(connection: sql.Connection, before: float, now: float) -> list[str]:
    """Remove what was retired earlier than a moment, unless somebody leases its key; returns the keys."""
    leased = sql.select(schema.leases.c.name).where(schema.leases.c.expires_at > now)
    table = schema.artifacts.c
    gone = list(connection.scalars(sql.select(table.key).where(table.retired_at < before, table.key.not_in(leased))))
    for chunk in chunks(gone):
        for column in (schema.files.c.artifact, schema.inputs.c.artifact, table.key):
            connection.execute(sql.delete(column.table).where(column.in_(chunk)))
    if gone:
        set_head(connection, artifacts=head(connection, "artifacts") - len(gone))
    return gone


def head(connection: sql.Connection, name: str) -> int:
    """One of the numbers that the catalog keeps of itself."""
    return int(connection.execute(sql.select(schema.head.c.value).where(schema.head.c.name == name)).scalar_one())


def set_head(connection: sql.Connection, **values: int) -> None:
    """Change some of the numbers that the catalog keeps of itself."""
    for name, value in values.items():
        connection.execute(schema.head.update().where(schema.head.c.name == name).values(value=value))


def chunks(keys: Sequence[str], many: int = _MANY) -> Iterator[Sequence[str]]:
    """Keys, some at a time: by default as many as one query takes."""
    for start in range(0, len(keys), many):
        yield keys[start : start + many]


def _seal(row: Mapping[str, Any], files: Mapping[str, File], inputs: Sequence[str]) -> str:
    return seals.of_entry(row, [(name, file.digest, file.size) for name, file in files.items()], inputs)


def _spelled(identity: Mapping[str, Any] | None) -> str:
    if identity is None:
        return ""
    return canonical({name: _shortened(value) for name, value in identity.items()})


def _shortened(value: Any) -> Any:
    text = canonical(value)
    if len(text) > _LONG:
        return {"sha256": seals.of_text(text)}
    return json.loads(text) if isinstance(value, Spelled) else value
