"""Beliefs and the information of the next rollouts, against quadrature and golden numbers."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta as beta_distribution
from scipy.stats import betabinom

from pipeline.beliefs import entropy, from_history, mutual_information, predictive, update
from tests.oracles import information_by_quadrature

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/insight.json").read_text())
counts = st.floats(0.2, 200.0)


def information(alpha: float, beta: float, rollouts: int) -> float:
    return float(mutual_information(np.array([float(alpha)]), np.array([float(beta)]), rollouts)[0])


@pytest.mark.parametrize(
    ("alpha", "beta", "rollouts", "expected"),
    [*GOLDEN["information"], *([row[0], row[1], GOLDEN["rollouts"], row[3]] for row in GOLDEN["rows"])],
)
def test_information_has_the_golden_values(alpha, beta, rollouts, expected):
    """The information agrees with 40-digit arithmetic to 1e-9 nats."""
    assert information(alpha, beta, rollouts) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rollouts", [1, 8])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (3.0, 7.0), (2.5, 1.5), (12.0, 4.0)])
def test_information_is_the_expected_divergence(alpha, beta, rollouts):
    """The information equals the quadrature of the expected divergence of the outcomes from their mixture."""
    assert information(alpha, beta, rollouts) == pytest.approx(
        information_by_quadrature(alpha, beta, rollouts), abs=1e-9
    )


def test_one_rollout_of_a_flat_prior_tells_ln2_minus_a_half():
    """By hand: for K = 1 and Beta(1, 1) the information is ln 2 - 1/2."""
    assert information(1, 1, 1) == pytest.approx(np.log(2) - 0.5, abs=1e-12)


@given(counts, counts)
def test_entropy_is_that_of_scipy(alpha, beta):
    """The entropy of a Beta is the one that SciPy integrates."""
    ours = float(entropy(np.array([alpha]), np.array([beta]))[0])
    assert ours == pytest.approx(float(beta_distribution(alpha, beta).entropy()), abs=1e-6)


@given(counts, counts, st.integers(1, 16))
def test_predictive_is_beta_binomial(alpha, beta, rollouts):
    """The predictive sums to one and is SciPy's beta-binomial."""
    p = predictive(np.array([alpha]), np.array([beta]), rollouts)[0]
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert p == pytest.approx(betabinom(rollouts, alpha, beta).pmf(np.arange(rollouts + 1)), abs=1e-8)


@given(st.floats(0.01, 1e5), st.floats(0.01, 1e5), st.integers(1, 32))
def test_information_is_not_negative_and_symmetric(alpha, beta, rollouts):
    """No outcome tells less than nothing, and success and failure tell the same."""
    assert information(alpha, beta, rollouts) >= 0
    assert information(alpha, beta, rollouts) == pytest.approx(information(beta, alpha, rollouts), abs=1e-8)


@given(st.floats(1.0, 50.0), st.floats(1.0, 50.0), st.floats(1.5, 20.0), st.integers(1, 16))
def test_more_evidence_leaves_less_to_learn(alpha, beta, factor, rollouts):
    """Multiplying the evidence at an unchanged mean lowers the information."""
    assert information(factor * alpha, factor * beta, rollouts) < information(alpha, beta, rollouts)


@given(st.floats(1.0, 50.0), st.floats(1.0, 50.0), st.integers(1, 16))
def test_more_rollouts_tell_more(alpha, beta, rollouts):
    """One more planned rollout raises the information."""
    assert information(alpha, beta, rollouts + 1) > information(alpha, beta, rollouts)


@pytest.mark.parametrize("rollouts", [1, 8, 64])
def test_information_approaches_its_limit(rollouts):
    """With much evidence and a middling mean the information is ln(1 + K / n) / 2, to a hundredth of itself."""
    assert information(2000, 3000, rollouts) == pytest.approx(np.log1p(rollouts / 5000) / 2, rel=1e-2)


@pytest.mark.parametrize(
    ("alpha", "beta", "rollouts", "message"),
    [(0.0, 1.0, 8, "must be positive"), (1.0, -1.0, 8, "must be positive"), (1.0, 1.0, 0, "rollouts = 0")],
)
def test_impossible_beliefs_are_refused(alpha, beta, rollouts, message):
    """A count that is not positive, or no rollout to plan for, is refused."""
    with pytest.raises(ValueError, match=message):
        information(alpha, beta, rollouts)


def test_update_by_hand():
    """A visit discounts toward the prior, then counts; a prompt without a counted rollout keeps its belief."""
    alpha, beta = update(
        np.array([5.0, 5.0]), np.array([3.0, 3.0]), np.array([2.0, 0.0]), np.array([6.0, 0.0]), discount=0.5
    )
    assert alpha.tolist() == [0.5 * 5 + 0.5 + 2, 5.0]
    assert beta.tolist() == [0.5 * 3 + 0.5 + 6, 3.0]


visits = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=5)


@given(st.dictionaries(st.sampled_from("abcd"), visits), st.floats(0.1, 1.0), st.integers(0, 2))
def test_history_is_updates_in_order(history, discount, informative):
    """Folding a history equals updating visit by visit, the first ones weighed instead of discounted."""
    alpha, beta = from_history(
        list("abcd"), history, discount=discount, prior=(1.0, 2.0), strength=0.5, informative=informative
    )
    for row, uid in enumerate("abcd"):
        a, b = np.array([1.0]), np.array([2.0])
        for visit, (s, f) in enumerate(history.get(uid, [])):
            if visit < informative:
                a, b = a + 0.5 * s, b + 0.5 * f
            else:
                a, b = update(a, b, np.array([float(s)]), np.array([float(f)]), discount=discount, prior=(1.0, 2.0))
        assert alpha[row] == pytest.approx(a[0])
        assert beta[row] == pytest.approx(b[0])


def test_order_of_visits_is_irrelevant_without_discount():
    """With a discount of one, visits may be recorded in any order."""
    told = {
        tuple(np.concatenate(from_history(["a"], {"a": list(order)})).tolist())
        for order in permutations([(1, 7), (8, 0), (0, 8), (3, 5)])
    }
    assert told == {(13.0, 21.0)}
