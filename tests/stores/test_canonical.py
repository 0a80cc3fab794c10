"""Canonical JSON: equal values have one spelling, and what has none is named."""

import json
from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores.canonical import Spelled, canonical, spell_pairs
from stores.store import Store

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(value=JSON)
@settings(max_examples=50, deadline=None)
def test_values_round_trip(value: Any) -> None:
    """The spelling is JSON for the value itself."""
    assert json.loads(canonical(value)) == value


def test_order_and_container_do_not_matter() -> None:
    """Key order, tuples and kinds of mapping do not change the spelling."""
    assert canonical({"b": 1, "a": (1, 2)}) == canonical(OrderedDict(a=[1, 2], b=1)) == '{"a":[1,2],"b":1}'


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), b"x", {1, 2}, np.float32(1), {1: 2}, object()])
def test_what_has_no_spelling_is_named(bad: Any) -> None:
    """An error names the entry."""
    with pytest.raises(ValueError, match=r"^settings\['a'\]\[1\]"):
        canonical({"a": [0, bad]}, "settings")


@given(pairs=st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=5))
@settings(max_examples=50, deadline=None)
def test_pairs_are_spelled_as_lists_are(pairs: list[tuple[str, str]]) -> None:
    """Columns have the spelling of the list of their pairs, quotes, control characters and other scripts included."""
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    found = spell_pairs(pa.array(first, pa.string()), pa.array(second, pa.string()))
    assert found.text == canonical(found) == canonical(pairs)


@pytest.mark.parametrize("count", [3, 3000])
def test_a_spelled_value_makes_the_same_key_and_row(local: Store, count: int) -> None:
    """A value and its spelling give one key, and one entry of the catalog, short or long."""
    pairs = [[f"uid-{number}", "prior"] for number in range(count)]
    plain, spelled = (local.key("selection", a=1, excluded=value) for value in (pairs, Spelled(canonical(pairs))))
    assert plain == spelled
    local.record(plain, "one", {})
    before = local.get(plain).identity
    local.catalog.retire(plain)
    other = local.key("selection", a=2, excluded=Spelled(canonical(pairs)))
    local.record(other, "one", {})
    assert local.get(other).identity == {**before, "a": 2}
