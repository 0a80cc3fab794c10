"""The random control."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from pipeline.records import keyed_seed
from pipeline.selectors import uniform

uids = st.lists(st.text("abcdef", min_size=1, max_size=6), unique=True, min_size=1, max_size=20)


@given(uids, st.randoms(), st.integers(0, 5))
def test_scores_belong_to_prompts_not_to_rows(uids, random, seed):
    """Reordering the pool reorders the scores with it."""
    score = dict(zip(uids, uniform.score(uids, seed=seed), strict=True))
    random.shuffle(uids)
    assert dict(zip(uids, uniform.score(uids, seed=seed), strict=True)) == score


def test_scores_are_uniform_and_seeds_independent():
    """Scores lie in [0, 1), pass a Kolmogorov-Smirnov test, and do not correlate between seeds."""
    pool = [f"prompt-{i}" for i in range(4000)]
    first, second = uniform.score(pool, seed=0), uniform.score(pool, seed=1)
    assert 0 <= first.min() <= first.max() < 1
    assert kstest(first, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(len(pool))


@given(st.lists(st.text(max_size=6), max_size=10), st.integers(0, 2**40))
def test_scores_are_keyed_seeds(uids, seed):
    """Whatever letters an id has, in a list or an Arrow column, its score is its keyed seed over 2^63, to the bit."""
    expected = [keyed_seed("uniform", seed, uid) / 2.0**63 for uid in uids]
    assert uniform.score(uids, seed=seed).tolist() == expected
    assert uniform.score(pa.array(uids, pa.string()), seed=seed).tolist() == expected
