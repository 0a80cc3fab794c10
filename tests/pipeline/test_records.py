"""Columns, identities and seeds."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import Prompts, canonical, keyed_seed, prompt_uid

NAMES = ("prompt_uid", "messages", "ground_truth", "data_source", "ability", "verifier")


def make(*uids):
    return Prompts(*(tuple(f"{name} {uid}" if name != "prompt_uid" else uid for uid in uids) for name in NAMES))


def test_rows_are_taken_and_joined_in_order():
    """Rows come in the order asked for, also twice; parts are joined in order."""
    prompts = make("a", "b", "c")
    assert prompts.take([2, 0, 2]) == make("c", "a", "c")
    assert Prompts.concat([make("a"), make(), make("b", "c")]) == prompts
    assert Prompts.of({**prompts.columns(), "extra": (1, 2, 3)}) == prompts
    assert (len(prompts), len(make())) == (3, 0)


def test_columns_that_do_not_fit_are_refused_by_name():
    """Unequal lengths and missing columns are named."""
    columns = make("a", "b").columns()
    with pytest.raises(ValueError, match=r"unequal lengths.*'ability': 1"):
        Prompts.of({**columns, "ability": ("x",)})
    del columns["verifier"]
    with pytest.raises(ValueError, match=r"needs column\(s\) \['verifier'\]"):
        Prompts.of(columns)


def test_rows_are_found_by_identity():
    """Rows come back in the order of the uids; an unknown one is named."""
    assert make("a", "b", "c").rows_of(["c", "a"]) == [2, 0]
    with pytest.raises(KeyError, match="first: z"):
        make("a").rows_of(["z"])


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_canonical_json_round_trips(value):
    """One text a value, which reads back as that value."""
    assert json.loads(canonical(value)) == value
    with pytest.raises(ValueError, match="JSON"):
        canonical([value, float("nan")])


@given(*[st.text(max_size=5)] * 6)
def test_identity_tells_prompts_apart(a, b, c, x, y, z):
    """Two prompts share a uid only if messages, ground truth and source agree."""
    assert (prompt_uid(a, b, c) == prompt_uid(x, y, z)) == ((a, b, c) == (x, y, z))
    assert len(prompt_uid(a, b, c)) == 32


def test_identity_does_not_change_between_versions():
    """The uid of a prompt is a promise to stored data: this one is fixed."""
    messages = canonical([{"role": "user", "content": "1+1="}])
    assert messages == '[{"content":"1+1=","role":"user"}]'
    assert prompt_uid(messages, "2", "made") == "c15727d17fd717c2f467b17ef9bc6105"
    assert keyed_seed("draw", 0, "prompt", 1) == 2514180338099271790
    assert 0 <= keyed_seed("x") < 2**63
