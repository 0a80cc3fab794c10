"""The arithmetic and letter tasks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.embedded.families import ALPHABET, TRAINING_MIX, distinct, example, without_carry

FAMILIES = sorted({*TRAINING_MIX, "mul"})


def number(text):
    return int(text[::-1])


@pytest.mark.parametrize("family", FAMILIES)
@given(seed=st.integers(0, 10**6))
def test_the_answer_is_true(family, seed):
    """Prompt and answer fit the model and the alphabet, and the answer is what Python says, written low digit first."""
    prompt, answer = example(family, np.random.default_rng(seed))
    assert len(prompt) <= 9
    assert len(answer) <= 5
    assert set(prompt + answer) <= set(ALPHABET)
    body = prompt[:-1]
    if family in ("rev", "sort"):
        word = body[1:]
        assert answer == (word[::-1] if family == "rev" else "".join(sorted(word)))
    elif family == "mul":
        a, b = body.split("*")
        assert number(answer) == number(a) * number(b)
    elif "sub" in family:
        a, b = body.split("-")
        assert number(answer) == number(a) - number(b)
    else:
        assert number(answer) == sum(number(term) for term in body.split("+"))


@pytest.mark.parametrize(("family", "carries"), [("easy", False), ("add", True), ("easysub", False), ("sub", True)])
@given(seed=st.integers(0, 10**6))
def test_carries_make_a_family_hard(family, carries, seed):
    """Dropping the carries changes the answer exactly in the families that have them."""
    prompt, answer = example(family, np.random.default_rng(seed))
    plain = without_carry(prompt)
    assert (plain[:3] != answer[:3] or (len(answer) == 4 and plain != answer)) == carries


def test_without_carry_by_hand():
    """758 + 467 digit by digit, and 521 - 178 digit by digit, low digit first."""
    assert without_carry("857+764=") == "5110"
    assert without_carry("125-871=") == "354"


def test_distinct_prompts_are_not_drawn_twice():
    """No prompt is taken twice, within a family or across calls."""
    taken = set()
    rng = np.random.default_rng(0)
    first, second = distinct("easy", 50, rng, taken), distinct("easy", 50, rng, taken)
    assert len({prompt for prompt, _ in first + second}) == 100 == len(taken)


def test_an_unknown_family_is_named():
    """An unknown family is refused by name."""
    with pytest.raises(ValueError, match="'div'"):
        example("div", np.random.default_rng(0))
