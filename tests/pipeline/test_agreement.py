"""Rank agreement and reliability, against hand-worked cases, SciPy, and simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from pipeline.agreement import rank_agreement, reliability

COLUMNS = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=12)


def test_ties_by_hand():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: rho is 4.5 over the root of 4.5 times 5."""
    found = rank_agreement(np.array([0.0, 1.0, 1.0, 7.0]), np.array([10.0, 20.0, 30.0, 40.0]))
    assert found["rho"] == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))
    assert found["n"] == 4


@given(COLUMNS)
def test_agreement_is_spearmans(pairs):
    """It is SciPy's coefficient, ties included; it knows no scale, and turns with the sign; the interval is in [-1, 1]."""
    x, y = (np.array(column, float) for column in zip(*pairs, strict=True))
    found = rank_agreement(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found == {"rho": None, "low": None, "high": None, "n": len(x)}
        return
    assert found["rho"] == pytest.approx(spearmanr(x, y).statistic)
    assert rank_agreement(np.exp(x), -y)["rho"] == pytest.approx(-found["rho"])
    assert -1 - 1e-9 <= found["low"] <= found["high"] <= 1 + 1e-9


def test_the_effect_itself_agrees_and_a_permutation_does_not():
    """A score that equals the effect has rho 1, with no doubt; of 60 permuted ones the intervals hold zero, but for a few."""
    rng = np.random.default_rng(0)
    effects = rng.normal(size=100)
    itself = rank_agreement(effects, effects)
    assert [itself[name] for name in ("rho", "low", "high")] == pytest.approx([1, 1, 1])
    lost = [rank_agreement(rng.permutation(effects), effects) for _ in range(60)]
    assert abs(np.mean([found["rho"] for found in lost])) < 4 * 0.1 / np.sqrt(60)
    assert np.mean([found["low"] < 0 < found["high"] for found in lost]) > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 60)


def test_the_interval_covers_at_its_level():
    """Of 300 samples of 60 pairs of known correlation, 95 % of the intervals hold the rank correlation, to 4 errors."""
    rng, r = np.random.default_rng(1), 0.6
    truth = 6 / np.pi * np.arcsin(r / 2)  # of normal pairs (Pearson 1907)
    held = []
    for seed in range(300):
        x = rng.normal(size=60)
        found = rank_agreement(x, r * x + np.sqrt(1 - r * r) * rng.normal(size=60), seed=seed)
        held.append(found["low"] <= truth <= found["high"])
    assert np.mean(held) > 0.95 - 4 * np.sqrt(0.95 * 0.05 / 300)
    assert np.mean(held) < 1.0


def test_reliability_of_the_whole_from_halves():
    """Doubling the measurement of a simulated score brings the agreement that Spearman and Brown foretell."""
    rng = np.random.default_rng(2)
    true = rng.normal(size=4000)
    a, b, c, d = (true + 1.5 * rng.normal(size=4000) for _ in range(4))
    foretold = reliability(a, b)["whole"]
    assert foretold == pytest.approx(rank_agreement(a + b, c + d)["rho"], abs=0.04)
    by_hand = reliability(np.arange(5.0), np.array([0.0, 1.0, 2.0, 4.0, 3.0]))
    assert by_hand["halves"] == pytest.approx(0.9) and by_hand["whole"] == pytest.approx(1.8 / 1.9)
    assert reliability(np.arange(5.0), -np.arange(5.0))["whole"] is None
    assert reliability(np.ones(5), np.arange(5.0))["whole"] is None


def test_bad_columns_are_refused():
    """Unequal lengths and values that are not finite are named."""
    with pytest.raises((ValueError, TypeError)):  # whoever looks first: the shapes in the signature, or the function
        rank_agreement(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="row 1"):
        rank_agreement(np.array([1.0, np.nan]), np.ones(2))
