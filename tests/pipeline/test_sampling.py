"""Which prompts make a batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sampling import best_of_candidates, shuffle
from pipeline.selectors import insight

CANDIDATES = 16  # the default

pools = st.lists(st.text("abcdef", min_size=1, max_size=6), unique=True, min_size=1, max_size=20)


def best(uids, alpha, beta, step=0, *, batch=4, seed=0):
    return best_of_candidates(uids, alpha, beta, step, batch=batch, rollouts=8, seed=seed, mu=0.3, eta=3.0)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("seed", [0, 1])
def test_an_epoch_visits_every_prompt(size, seed):
    """The fewest batches that can hold all prompts do hold them all; no batch holds a prompt twice."""
    uids = [f"prompt-{i}" for i in range(size)]
    for batch in range(1, size + 1):
        epoch = -(-size // batch)
        batches = [shuffle(uids, step, batch=batch, seed=seed) for step in range(4 * epoch)]
        assert all(len(set(rows)) == len(rows) == batch for rows in batches)
        for first in range(0, len(batches), epoch):
            assert {row for rows in batches[first : first + epoch] for row in rows} == set(range(size))


@given(pools, st.randoms(), st.integers(0, 5), st.integers(0, 3))
def test_a_batch_is_chosen_by_identity(uids, random, step, seed):
    """Reordering the pool changes no batch, neither of the shuffle nor of the best candidates."""
    belief = {uid: (1.0 + i % 3, 1.0 + i % 5) for i, uid in enumerate(uids)}
    size = min(4, len(uids))

    def batches(order):
        alpha, beta = (np.array([belief[uid][i] for uid in order]) for i in (0, 1))
        rows = shuffle(order, step, batch=size, seed=seed), best(order, alpha, beta, step, batch=size, seed=seed)
        return [[order[i] for i in r] for r in rows]

    other = list(uids)
    random.shuffle(other)
    assert batches(uids) == batches(other)


def test_epochs_and_seeds_have_their_own_order():
    """The next epoch and another seed walk in another order."""
    uids = [f"prompt-{i}" for i in range(30)]
    walks = [shuffle(uids, step, batch=30, seed=seed) for step, seed in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(walk) for walk in walks}) == 3


def test_the_best_of_the_whole_pool_are_chosen():
    """Where every prompt is a candidate, the batch is the highest scores, best first."""
    rng = np.random.default_rng(0)
    uids = [f"prompt-{i}" for i in range(4 * CANDIDATES)]
    alpha, beta = rng.uniform(1, 20, (2, len(uids)))
    expected = np.argsort(-insight.score(alpha, beta))[:4]
    assert best(uids, alpha, beta) == expected.tolist()


def test_candidates_are_a_part_of_a_large_pool():
    """Of a pool larger than the candidate set, each step looks at another random part."""
    uids = [f"prompt-{i}" for i in range(40 * CANDIDATES)]
    alpha = np.linspace(1.0, 2.0, len(uids))
    first, second = (set(best(uids, alpha, np.ones(len(uids)), step, batch=2)) for step in (0, 1))
    assert first != second


def test_ties_are_broken_at_random():
    """With equal beliefs every prompt comes up, and no row is preferred."""
    uids = [f"prompt-{i}" for i in range(16)]
    seen = np.bincount([i for step in range(200) for i in best(uids, np.ones(16), np.ones(16), step)], minlength=16)
    assert seen.sum() == 800
    assert np.abs(seen - 50).max() < 4 * np.sqrt(50)


def test_a_small_pool_gives_what_it_has():
    """Fewer prompts than a batch: each is chosen once."""
    assert sorted(best(["a", "b"], np.ones(2), np.ones(2))) == [0, 1]
    assert sorted(shuffle(["a", "b"], 0, batch=5, seed=0)) == [0, 1]
