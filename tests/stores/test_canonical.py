"""Canonical JSON: equal values have one spelling, and what has none is named."""

import json
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores.canonical import canonical

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
