"""Alignment with targets and the fusion of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.influence import cosine, fuse_ranks, mean_gradient
from tests.oracles import cosine_by_loop, fuse_by_sorting

seeds = st.integers(0, 10**6)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@given(seeds, st.integers(1, 6), st.integers(1, 3), st.integers(1, 8))
def test_cosine_is_the_double_loop(seed, prompts, targets, dim):
    """Each entry is the quotient of one inner product and two lengths, to float32 rounding."""
    z, v = draw(seed, prompts, dim), draw(seed + 1, targets, dim)
    assert cosine(z, v) == pytest.approx(cosine_by_loop(z, v), abs=2e-6)


@given(seeds, st.floats(1e-12, 1e12), st.floats(1e-12, 1e12))
def test_cosine_is_free_of_scale(seed, a, b):
    """Scaling a gradient or a target, even far, changes nothing beyond rounding."""
    z, v = draw(seed, 4, 6), draw(seed + 1, 2, 6)
    assert cosine(a * z, b * v) == pytest.approx(cosine(z, v), abs=2e-6)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
@pytest.mark.parametrize("side", ["features", "targets"])
def test_a_row_without_direction_is_refused(side, value):
    """A zero or non-finite row is refused, with its side and its row."""
    rows = {"features": draw(0, 4, 3), "targets": draw(1, 4, 3)}
    rows[side][2] = value
    with pytest.raises(ValueError, match=rf"{side}: 1 row.*first row 2"):
        cosine(rows["features"], rows["targets"])


def test_fused_ranks_of_the_published_example():
    """Ranks {1, 40} fuse to 1.025, {2, 2} to 1 and {3} to a third."""
    scores = np.full((50, 2), -1.0) - np.arange(50.0)[:, None]
    scores[0] = 100.0, -3.5  # first for one target; placed fortieth for the other below
    scores[1] = 99.0, 99.0
    scores[2] = 98.0, -1000.0
    second = np.argsort(-scores[:, 1], kind="stable").tolist()
    scores[3, 1] = 100.0
    order = [i for i in second if i not in (0, 1, 2, 3)]
    scores[order, 1] = -np.arange(len(order), dtype=float)
    scores[0, 1] = -36.5  # after 3, 1 and 37 others
    fused = fuse_ranks(scores, 40)
    assert fused[:3] == pytest.approx([1.025, 1.0, 1 / 3])


@given(
    arrays(np.float64, st.tuples(st.integers(1, 8), st.integers(1, 3)), elements=st.integers(-3, 3).map(float)),
    st.integers(0, 10),
)
def test_fusion_is_sorting_by_hand(scores, budget):
    """The fused score is the sum of 1 / rank over sorted, cut lists, ties in row order."""
    assert fuse_ranks(scores, budget) == pytest.approx(fuse_by_sorting(scores, budget))


def test_a_negative_budget_is_refused():
    """A budget below zero is refused."""
    with pytest.raises(ValueError, match="budget = -1"):
        fuse_ranks(np.ones((2, 1)), -1)


def test_mean_gradient_counts_prompts_without_signal():
    """The mean restores each row's length and divides by the whole set."""
    unit = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
    norms = np.array([4.0, 10.0], np.float32)
    assert mean_gradient(unit, norms, size=5) == pytest.approx([2.0, 1.6], abs=1e-6)
    with pytest.raises(ValueError, match="size = 1"):
        mean_gradient(unit, norms, size=1)
