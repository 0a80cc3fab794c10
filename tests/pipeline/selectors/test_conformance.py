"""What every selector of the table keeps to."""

import inspect

import numpy as np
import pytest

from pipeline.selectors import SELECTORS

RNG = np.random.default_rng(0)
POOL = 12
INPUTS = {
    "cropi": (RNG.standard_normal((POOL, 4)), RNG.standard_normal((2, 4))),
    "insight": (RNG.uniform(1, 9, POOL), RNG.uniform(1, 9, POOL)),
    "uniform": (np.array([f"prompt-{i}" for i in range(POOL)]),),
}
PER_PROMPT = {"cropi": 1, "insight": 2, "uniform": 1}  # leading arguments with one row a prompt


@pytest.fixture(params=sorted(SELECTORS))
def selector(request):
    """Each selector's name in turn."""
    return request.param


def call(name, rows):
    given = [x[rows] if i < PER_PROMPT[name] else x for i, x in enumerate(INPUTS[name])]
    given = [x.tolist() if x.dtype.kind == "U" else x for x in given]
    return SELECTORS[name].score(*given)


def test_one_finite_score_a_prompt(selector):
    """A selector returns a finite number, or one a target, for each prompt."""
    score = call(selector, np.arange(POOL))
    assert len(score) == POOL
    assert np.isfinite(score).all()


def test_scores_follow_their_prompts(selector):
    """Reordering the pool, or scoring a part of it, changes no prompt's score beyond rounding."""
    whole = call(selector, np.arange(POOL))
    rows = np.random.default_rng(1).permutation(POOL)[:7]
    assert call(selector, rows) == pytest.approx(whole[rows], rel=1e-6)


def test_the_table_is_documented(selector):
    """A selector says what it computes and carries the revision that keys its results."""
    module = SELECTORS[selector]
    assert module.__name__ == f"pipeline.selectors.{selector}"
    assert isinstance(module.REVISION, int)
    assert inspect.getdoc(module)
    assert inspect.getdoc(module.score)
