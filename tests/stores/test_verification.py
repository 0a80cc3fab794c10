"""The full scan: every referenced file and the catalog itself, with what is wrong and what was read."""

from collections.abc import Callable
from typing import Any

from stores.store import Store
from stores.verification import verify


def test_what_is_wrong_is_named(store: Store, overwrite: Callable[..., None]) -> None:
    """Every referenced file has a verdict, read once, with an error for those that are damaged or gone."""
    store.record("a", "t", {}, {"x": b"1", "y": b"2"})
    store.record("b", "t", {}, {"x": b"3", "z": b"1"})
    assert [(v.key, v.name, v.read, v.wrong) for v in verify(store)] == [
        ("a", "x", 1, None),
        ("a", "y", 1, None),
        ("b", "x", 1, None),
        ("b", "z", 0, None),
    ]
    overwrite(store, store.get("a").files["y"], b"9")
    overwrite(store, store.get("b").files["x"], None)
    wrong: dict[Any, str | None] = {(v.key, v.name): v.wrong for v in verify(store)}
    assert wrong["a", "x"] is None and wrong["b", "z"] is None
    assert "SHA-256" in str(wrong["a", "y"]) and str(store.root) in str(wrong["a", "y"])
    assert "is not in the store" in str(wrong["b", "x"])


def test_the_catalog_is_checked_too(store: Store) -> None:
    """A count that was altered behind the catalog's back is found."""
    store.beliefs.apply("batch", [("p", 1, 2)], {})
    with store.catalog.database.transaction(write=True) as connection:
        connection.exec_driver_sql("update counts set successes = 9")
    (verdict,) = verify(store)
    assert verdict.file is None and "the counts of batch" in str(verdict.wrong)


def test_a_damaged_entry_does_not_end_the_scan(store: Store) -> None:
    """An entry that is not what was committed is named, and the files of the others are read all the same."""
    for key in ("a", "b"):
        store.record(key, "t", {}, {"f": key.encode()})
    with store.catalog.database.transaction(write=True) as connection:
        connection.exec_driver_sql("update artifacts set meta = '7' where key = 'a'")
    found = list(verify(store))
    assert [(v.key, v.wrong) for v in found if v.file] == [("b", None)]
    assert any("the entry of a" in str(v.wrong) for v in found)
