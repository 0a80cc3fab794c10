"""The coefficients of the objectives, against loops and against each other."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.advantages import EPSILON
from pipeline.objective import (
    OBJECTIVES,
    grpo,
    grpo_clipped,
    grpo_optimal_baseline,
    grpo_sequence,
    grpo_weighted_group,
    reinforce,
    rft,
)
from tests.oracles import coefficients_by_autograd

seeds = st.integers(0, 10**6)


def batch(seed, drift=0.5):
    rng = np.random.default_rng(seed)
    owner = np.repeat([0, 1, 2], [4, 1, 3])
    mask = np.arange(5) < rng.integers(1, 6, len(owner))[:, None]
    old = -rng.exponential(1.0, mask.shape) * mask
    new = old + drift * rng.standard_normal(mask.shape) * mask
    rewards = rng.integers(0, 2, len(owner)).astype(float)
    return new, old, mask, rewards, owner


def test_grpo_by_hand():
    """Two rollouts, one right: ratio times advantage over K and over the rollout's own length."""
    new, old = np.log([[0.5, 0.4], [0.2, 1.0]]), np.log([[0.25, 0.4], [0.4, 1.0]])
    mask = np.array([[True, True], [True, False]])
    a = 0.5 / (np.sqrt(0.5) + EPSILON)
    c = grpo(new, old, mask, np.array([1.0, 0.0]), np.array([0, 0]))
    assert c == pytest.approx(np.array([[2.0 * a / 4, a / 4], [-0.5 * a / 2, 0.0]]))


def test_grpo_sequence_by_hand():
    """Sequence ratios 2 and 1/2 are self-normalised, and centre the rewards with their own weights."""
    new, old = np.log([[0.5, 0.4], [0.2, 1.0]]), np.log([[0.25, 0.4], [0.4, 1.0]])
    mask = np.array([[True, True], [True, False]])
    c = grpo_sequence(new, old, mask, np.array([1.0, 0.0]), np.array([0, 0]))
    a = np.array([0.2, -0.8]) / (0.4 + EPSILON)  # weighted mean 4/5, weighted deviation sqrt(4/25)
    assert c == pytest.approx(np.array([[0.8 * a[0] / 2] * 2, [0.2 * a[1], 0.0]]))


def test_grpo_weighted_group_by_hand():
    """Mean log ratios log 2 / 2 and -log 2 weigh the statistics as 2^1.5 to 1; the token ratio stays."""
    new, old = np.log([[0.5, 0.4], [0.2, 1.0]]), np.log([[0.25, 0.4], [0.4, 1.0]])
    mask = np.array([[True, True], [True, False]])
    c = grpo_weighted_group(new, old, mask, np.array([1.0, 0.0]), np.array([0, 0]))
    mean = 2**1.5 / (2**1.5 + 1)
    a = np.array([1 - mean, -mean]) / (np.sqrt(mean * (1 - mean)) + EPSILON)
    assert c == pytest.approx(np.array([[2.0 * a[0] / 4, a[0] / 4], [0.5 * a[1] / 2, 0.0]]))


def test_grpo_optimal_baseline_by_hand():
    """Ratios 2 and 1/2 on m = (.5^2 + .6^2) / 4 and .8^2: the baseline is .305 / (.305 + .32), the deviation .4."""
    new, old = np.log([[0.5, 0.4], [0.2, 1.0]]), np.log([[0.25, 0.4], [0.4, 1.0]])
    mask = np.array([[True, True], [True, False]])
    c = grpo_optimal_baseline(new, old, mask, np.array([1.0, 0.0]), np.array([0, 0]))
    b = 0.305 / 0.625
    assert c == pytest.approx(np.array([[0.8 * (1 - b) / (0.4 + EPSILON) / 2] * 2, [-0.2 * b / (0.4 + EPSILON), 0.0]]))


def test_the_optimal_baseline_leaves_the_least_variance():
    """Of all constants, the baseline taken from the rewards of two outcomes gives the least noise in the gradient."""
    policy, reward = np.array([0.8, 0.2]), np.array([1.0, 0.0])
    s = np.eye(2) - policy  # gradient of log pi by the logits, one row an outcome

    def noise(b):
        g = (reward - b)[:, None] * s
        return policy @ (g**2).sum(1) - ((policy @ g) ** 2).sum()

    best = min(np.linspace(0, 1, 101), key=noise)
    x = np.array([0, 0, 0, 0, 1])  # each outcome as often as it is likely
    logp = np.log(policy[x])[:, None]
    c = grpo_optimal_baseline(logp, logp, np.ones((5, 1), bool), reward[x], np.zeros(5, int))
    assert c[0, 0] / -c[4, 0] == pytest.approx((1 - best) / best)
    assert noise(best) < 0.5 * noise(policy @ reward)  # the group's mean


def test_certain_tokens_leave_the_group_mean():
    """Where every token is certain no gradient is larger than another, and the baseline is the mean."""
    args = (np.zeros((3, 2)), np.zeros((3, 2)), np.ones((3, 2), bool), np.array([1.0, 0.0, 0.0]), np.zeros(3, int))
    assert grpo_optimal_baseline(*args) == pytest.approx(grpo_sequence(*args))


def test_reinforce_by_hand():
    """Three rollouts with ratios 2, 1/2 and 1: each is held against the weighted mean of the other two."""
    new, old = np.log([[0.5, 0.4], [0.2, 1.0], [0.3, 0.3]]), np.log([[0.25, 0.4], [0.4, 1.0], [0.3, 0.3]])
    mask = np.array([[True, True], [True, False], [True, True]])
    c = reinforce(new, old, mask, np.array([1.0, 0.0, 0.0]), np.zeros(3, int))
    assert c == pytest.approx(np.array([[2 * 1 / 3] * 2, [-0.5 * (2 / 3) / 3, 0.0], [-1 * (2 / 2.5) / 3] * 2]))


def test_reinforce_is_the_gradient_of_the_expected_reward():
    """Over all pooled groups, two draws of one sampler and one of another, the mean estimate is the exact gradient."""
    theta, samplers = np.array([0.2, -0.3, 0.4]), np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    policy, reward = np.exp(theta) / np.exp(theta).sum(), np.array([1.0, 0.0, 0.3])
    exact = policy * (reward - policy @ reward)  # d/dtheta of sum_x pi(x) R(x)
    mean = np.zeros(3)
    for group in product(range(3), repeat=3):
        x = list(group)
        c = reinforce(
            np.log(policy[x])[:, None],
            np.log(samplers[[0, 1, 2], x])[:, None],  # each rollout against the policy that drew it
            np.ones((3, 1), bool),
            reward[x],
            np.zeros(3, int),
        )
        mean += np.prod(samplers[[0, 1, 2], x]) * (c * (np.eye(3)[x] - policy)).sum(0)  # grad log pi(x) = e_x - pi
    assert mean == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@given(seed=seeds)
def test_coefficients_are_the_derivative_of_the_loss(name, seed):
    """Each token's coefficient is what automatic differentiation of the written-out loss gives."""
    new, old, mask, rewards, owner = batch(seed)
    c = OBJECTIVES[name](new, old, mask, rewards, owner)
    for group in (0, 2):
        rows = owner == group
        loop = coefficients_by_autograd(name, new[rows], old[rows], mask[rows], rewards[rows])
        assert c[rows] == pytest.approx(loop, abs=1e-9)


@pytest.mark.parametrize("name", ["grpo_sequence", "grpo_optimal_baseline", "reinforce"])
def test_long_stale_completions_do_not_underflow(name):
    """Ratios far below the smallest number still compare: the coefficients are finite, and the nearer rollout leads."""
    new, old = np.full((3, 1), -2000.0) - np.array([[0.0], [1.0], [3.0]]), np.zeros((3, 1))
    c = OBJECTIVES[name](new, old, np.ones((3, 1), bool), np.array([1.0, 0.0, 0.0]), np.zeros(3, int))
    assert np.isfinite(c).all()
    if name != "reinforce":  # whose weights are not relative to each other: these rollouts say nothing any more
        assert c[0, 0] > -c[1, 0] > -c[2, 0] > 0


def test_rft_by_hand():
    """Only rewarded rollouts count, each by the mean over its tokens."""
    mask = np.array([[True, True], [True, True], [True, False]])
    c = rft(np.zeros((3, 2)), np.zeros((3, 2)), mask, np.array([1.0, 0.0, 1.0]), np.zeros(3, int))
    assert c.tolist() == [[0.25, 0.25], [0.0, 0.0], [0.5, 0.0]]


def test_grpo_clipped_clips_on_the_losing_side_only():
    """A ratio that left the clip along with its advantage has no coefficient; one that left against it keeps it."""
    ratio = np.array([[1.3, 0.7, 1.1], [1.3, 0.7, 0.9]])
    args = (np.log(ratio), np.zeros((2, 3)), np.ones((2, 3), bool), np.array([1.0, 0.0]), np.zeros(2, int))
    c = grpo_clipped(*args)
    assert (c == 0).tolist() == [[True, False, False], [False, True, False]]
    assert c[c != 0] == pytest.approx(grpo(*args)[c != 0])


@given(seeds)
def test_on_policy_no_token_is_clipped(seed):
    """Where the sampler is the policy, no token is clipped and the two objectives are one."""
    new, _, mask, rewards, owner = batch(seed)
    assert np.array_equal(grpo_clipped(new, new, mask, rewards, owner), grpo(new, new, mask, rewards, owner))


@given(seeds)
def test_on_policy_grpo_sequence_differs_by_the_deviation_only(seed):
    """On policy all weights are one, and the two forms differ by biased against unbiased deviation alone."""
    new, _, mask, rewards, owner = batch(seed)
    plain, weighted = grpo(new, new, mask, rewards, owner), grpo_sequence(new, new, mask, rewards, owner)
    for group in np.unique(owner):
        rows = owner == group
        r = rewards[rows]
        unbiased = r.std(ddof=1) if len(r) > 1 else 0.0
        assert weighted[rows] * (r.std() + EPSILON) == pytest.approx(plain[rows] * (unbiased + EPSILON), abs=1e-12)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"rft"}))
@given(seed=seeds)
def test_a_group_that_agrees_has_no_gradient(name, seed):
    """Where all rewards of a group are equal, every coefficient is zero."""
    new, old, mask, _, owner = batch(seed)
    assert not OBJECTIVES[name](new, old, mask, np.ones(len(owner)), owner).any()


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@given(seed=seeds)
def test_padding_has_no_coefficient(name, seed):
    """What stands where there is no token changes nothing and gets nothing."""
    new, old, mask, rewards, owner = batch(seed)
    c = OBJECTIVES[name](new, old, mask, rewards, owner)
    assert not c[~mask].any()
    noisy = np.where(mask, new, 1e3)
    assert np.array_equal(OBJECTIVES[name](noisy, old, mask, rewards, owner), c)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@given(seed=seeds)
def test_prompts_do_not_mix(name, seed):
    """A prompt's coefficients are the same alone as among others."""
    new, old, mask, rewards, owner = batch(seed)
    whole = OBJECTIVES[name](new, old, mask, rewards, owner)
    for group in np.unique(owner):
        rows = owner == group
        alone = OBJECTIVES[name](new[rows], old[rows], mask[rows], rewards[rows], owner[rows])
        assert alone == pytest.approx(whole[rows])


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_a_rollout_without_tokens_has_no_coefficient(name):
    """An empty completion divides by no length: its row is zero and the others are finite."""
    new, old, mask, rewards, owner = batch(0)
    mask[1] = False
    rewards[:4] = [1.0, 0.0, 1.0, 0.0]
    c = OBJECTIVES[name](new, old, mask, rewards, owner)
    assert np.isfinite(c).all()
    assert not c[1].any()
