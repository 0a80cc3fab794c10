"""Verdicts of the single verifiers, in this process."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import VERDICTS
from pipeline.verifiers import NUMBER, Verdict, gold_completion, verify

CORRECT, INCORRECT, UNSCORABLE = "correct", "incorrect", "unscorable"
ENTRY = {"question": "1 + 1 =", "answer": "2", "metadata": {"source_dataset": "chain_sum"}}


@pytest.fixture(autouse=True)
def samples(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize(
    ("spec", "truth", "completion", "verdict"),
    [
        ({"id": "exact"}, "4", " 4\n", CORRECT),
        ({"id": "exact"}, "4", "four", INCORRECT),
        ({"id": "exact"}, "", "", CORRECT),
        ({"id": "numeric"}, "72", "48 + 24 = 72.", CORRECT),
        ({"id": "numeric", "take": "first"}, "72", "48 + 24 = 72.", INCORRECT),
        ({"id": "numeric", "take": "first"}, "-5", "-5\nor 7", CORRECT),
        ({"id": "numeric"}, "3", "5-3", CORRECT),
        ({"id": "numeric"}, "-3", "x = \u22123", CORRECT),
        ({"id": "numeric"}, "$1,234.50", "it costs 1234.5", CORRECT),
        ({"id": "numeric"}, "1234", "2,1234", CORRECT),
        ({"id": "numeric"}, ".5", "0.50", CORRECT),
        ({"id": "numeric"}, "2000", "2e3", CORRECT),
        ({"id": "numeric"}, "she has 3 + 4 apples\n#### 7", "7", CORRECT),
        ({"id": "numeric", "tolerance": 0.01}, "3.14159", "3.14", CORRECT),
        ({"id": "numeric"}, "3.14159", "3.14", INCORRECT),
        ({"id": "numeric"}, "5", "no number", INCORRECT),
        ({"id": "numeric"}, "5", "1e999999999", INCORRECT),
        ({"id": "numeric", "tolerance": 1}, "5", "1e999999999", INCORRECT),
        ({"id": "numeric"}, "5", "1e99999999999999999999999", INCORRECT),
        ({"id": "numeric"}, "five", "5", UNSCORABLE),
        ({"id": "numeric"}, "1/2", "2", UNSCORABLE),
        ({"id": "math-verify"}, "1/2", "so it is 0.5", CORRECT),
        ({"id": "math-verify"}, r"\frac{1}{2}", r"The answer is $\frac{2}{4}$.", CORRECT),
        ({"id": "math-verify"}, r"3\pi", r"\boxed{3}", INCORRECT),
        ({"id": "math-verify"}, r"3\pi", r"\boxed{\pi \cdot 3}", CORRECT),
        ({"id": "math-verify"}, "$x^2+1$", "$1+x^2$", CORRECT),
        ({"id": "math-verify"}, "7", "I do not know", INCORRECT),
        ({"id": "math-verify"}, "yes", "$yes$", UNSCORABLE),
        ({"id": "math-verify"}, "", "3", UNSCORABLE),
        ({"id": "reasoning-gym", "entry": ENTRY}, "2", "2", CORRECT),
        ({"id": "reasoning-gym", "entry": ENTRY}, "2", "3", INCORRECT),
        ({"id": "reasoning-gym", "entry": ENTRY}, "2", "it is 2", INCORRECT),
        ({"id": "reasoning-gym", "entry": ENTRY, "extract": "first_line"}, "2", "\n 2 \n3 + 3 = 6", CORRECT),
        ({"id": "reasoning-gym", "entry": ENTRY, "extract": "first_line"}, "2", "", INCORRECT),
        ({"id": "reasoning-gym", "entry": ENTRY, "extract": "answer_tags"}, "2", "<answer> 2\n</answer>", CORRECT),
        ({"id": "reasoning-gym", "entry": ENTRY, "extract": "answer_tags"}, "2", "2", INCORRECT),
        ({"id": "reasoning-gym", "entry": {}}, "2", "2", "error"),
        ({"id": "python", "function": "verifier_samples:undecided"}, "2", "2", UNSCORABLE),
        ({"id": "python", "function": "verifier_samples:misbehave"}, "2", "raise", "error"),
        ({"id": "python", "function": "verifier_samples:misbehave"}, "2", "exit", "error"),
        ({"id": "python", "function": "verifier_samples:misbehave"}, "2", "text", "error"),
        ({"id": "python", "function": "verifier_samples:misbehave"}, "2", "nan", "error"),
        ({"id": "python", "function": "verifier_samples:absent"}, "2", "2", "error"),
    ],
)
def test_verdicts_by_hand(spec, truth, completion, verdict):
    """Each verifier gives the verdict that a person would give."""
    assert verify(spec, truth, completion) == Verdict(verdict, 1.0 if verdict == CORRECT else 0.0)


def test_partial_credit_is_not_success():
    """A reasoning-gym score above zero but below the threshold is incorrect, and its reward is zero."""
    entry = {"answer": "1 + 2", "metadata": {"source_dataset": "countdown", "numbers": [1, 2], "target": 3}}
    assert verify({"id": "reasoning-gym", "entry": entry}, "1 + 2", "2 + 1") == Verdict(CORRECT, 1.0)
    assert verify({"id": "reasoning-gym", "entry": entry}, "1 + 2", "2 - 1") == Verdict(INCORRECT, 0.0)


@pytest.mark.parametrize(("completion", "verdict"), [("0.5", INCORRECT), ("0.75", CORRECT), ("2", CORRECT)])
def test_float_reward_is_kept_and_compared_with_the_threshold(completion, verdict):
    """A python verifier's float is the reward, and is correct from the threshold on."""
    spec = {"id": "python", "function": "verifier_samples:share", "threshold": 0.75}
    assert verify(spec, "", completion) == Verdict(verdict, float(completion))


def test_unknown_id_is_refused():
    """An unknown verifier id fails with the id and the known ones."""
    with pytest.raises(ValueError, match=r"'numerik'.*'numeric'"):
        verify({"id": "numerik"}, "1", "1")


@given(st.text(), st.text(), st.sampled_from(["first", "last"]), st.floats(0, 10))
@settings(max_examples=200, deadline=None)
def test_numeric_never_raises(truth, completion, take, tolerance):
    """``numeric`` has a verdict for any two texts."""
    spec = {"id": "numeric", "take": take, "tolerance": tolerance}
    assert verify(spec, truth, completion).verdict in ("correct", "incorrect", "unscorable")


@given(st.from_regex(NUMBER, fullmatch=True), st.from_regex(NUMBER, fullmatch=True), st.floats(0, 10))
@settings(max_examples=200, deadline=None)
def test_numeric_never_raises_on_numbers(truth, completion, tolerance):
    """``numeric`` has a verdict for any two numbers, and no completion of this kind makes it err."""
    verdict = verify({"id": "numeric", "tolerance": tolerance}, truth, completion).verdict
    assert verdict in VERDICTS
    assert verdict != "error"


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_exact_is_reflexive(text):
    """Every text is exactly itself."""
    assert verify({"id": "exact"}, text, text) == Verdict("correct", 1.0)


@pytest.mark.parametrize(
    ("spec", "truth"),
    [
        ({"id": "numeric", "take": "first"}, "2 + 5\n#### 7"),
        ({"id": "math-verify"}, r"\sqrt{3}"),
        ({"id": "reasoning-gym", "entry": ENTRY, "extract": "answer_tags"}, "2"),
    ],
)
def test_a_perfect_completion_is_correct(spec, truth):
    """The gold answer, written in the form that the verifier reads, is correct."""
    assert verify(spec, truth, gold_completion(spec, truth)).verdict == CORRECT


def test_math_verify_is_quiet(capfd):
    """math_verify's warnings about its own time limits reach no stream."""
    verify({"id": "math-verify"}, "1", "1")
    assert capfd.readouterr() == ("", "")
