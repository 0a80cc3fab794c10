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
