"""Entries: what two artifacts of one key differ in."""

from stores.entries import Artifact, differences
from stores.objects import File


def test_equal_artifacts_have_no_differences() -> None:
    """Tuples and lists, and the order of names, are no difference."""
    one = Artifact("key", "t", {"a": (1, 2), "b": None}, {"x": File("a", 1), "y": File("b", 1)})
    two = Artifact("key", "t", {"b": None, "a": [1, 2]}, {"y": File("b", 1), "x": File("a", 1)})
    assert differences(one, two) == []


def test_every_difference_is_named() -> None:
    """Kind, entries of meta and files that differ or are absent are all named; None is not absent."""
    one = Artifact("key", "t", {"a": 1, "b": None}, {"x": File("a", 1)})
    two = Artifact("key", "u", {"a": 2}, {"x": File("a", 2), "y": File("b", 1)})
    assert differences(one, two) == ["kind ('t', not 'u')", "meta['a']", "meta['b']", "file 'x'", "file 'y'"]


def test_what_a_clock_measured_is_no_difference() -> None:
    """The same work that took another time is the same artifact; other numbers beside the times are not."""
    metas = [
        {"seconds": t, "metrics": [{"seconds_update": t, "reward": r}]} for t, r in ((1.0, 0.5), (2.0, 0.5), (1.0, 0.7))
    ]
    one, slower, other = (Artifact("key", "t", meta, {}) for meta in metas)
    assert differences(one, slower) == []
    assert differences(one, other) == ["meta['metrics']"]
