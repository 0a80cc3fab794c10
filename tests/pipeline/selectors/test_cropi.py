"""CROPI's score."""

import numpy as np
import pytest

from pipeline.influence import cosine
from pipeline.selectors import cropi


def test_score_by_hand():
    """Aligned, opposed and orthogonal gradients score one, minus one and zero, whatever their length."""
    features = np.array([[2.0, 0.0], [-0.1, 0.0], [0.0, 9.0], [3.0, 3.0]])
    assert cropi.score(features, np.array([[5.0, 0.0]]))[:, 0] == pytest.approx(
        [1.0, -1.0, 0.0, np.sqrt(0.5)], abs=1e-6
    )


def test_score_is_the_cosine():
    """The published score is the cosine of ``pipeline.influence``."""
    rng = np.random.default_rng(0)
    features, targets = rng.standard_normal((6, 5)), rng.standard_normal((2, 5))
    assert np.array_equal(cropi.score(features, targets), cosine(features, targets))


def test_a_prompt_without_signal_is_refused():
    """A zero gradient has no direction, and the refusal names its row."""
    with pytest.raises(ValueError, match="first row 1"):
        cropi.score(np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones((1, 2)))
