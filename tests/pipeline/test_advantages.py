"""Group advantages, importance weights and effective sample sizes, by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.advantages import (
    effective_sample_size,
    group_advantages,
    has_signal,
    leave_one_out_advantages,
    relative_weights,
    sequence_weights,
    weighted_group_advantages,
)

groups = st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 3)), min_size=1, max_size=20)


def columns(pairs):
    return np.array([r for r, _ in pairs]), np.array([g for _, g in pairs])


def test_advantages_by_hand():
    """One success in four: mean 1/4, unbiased deviation 1/2."""
    a = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(4, int))
    assert a == pytest.approx(np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))


def test_groups_need_not_be_adjacent():
    """Rows of a group may be anywhere: each group is centred on its own."""
    a = group_advantages(np.array([1.0, 5.0, 0.0, 7.0]), np.array([0, 9, 0, 9]))
    s = np.sqrt(0.5)
    assert a == pytest.approx([0.5 / (s + 1e-4), -1 / (2 * s + 1e-4), -0.5 / (s + 1e-4), 1 / (2 * s + 1e-4)])


@given(groups)
def test_advantages_have_mean_zero_in_each_group(pairs):
    """Within a group the advantages cancel."""
    rewards, owner = columns(pairs)
    a = group_advantages(rewards, owner)
    assert [a[owner == g].sum() for g in np.unique(owner)] == pytest.approx([0] * len(np.unique(owner)), abs=1e-9)


@given(groups, st.floats(-5, 5))
def test_a_constant_added_to_all_rewards_changes_nothing(pairs, shift):
    """The baseline takes a shift of the rewards away."""
    rewards, owner = columns(pairs)
    assert group_advantages(rewards + shift, owner) == pytest.approx(group_advantages(rewards, owner), abs=1e-6)


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [0.0, 0.0], [1.0]])
def test_a_group_that_agrees_has_no_advantage(rewards):
    """Equal rewards, and a group of one, give exactly zero, plainly and weighted."""
    owner = np.zeros(len(rewards), int)
    assert not group_advantages(np.array(rewards), owner).any()
    assert not weighted_group_advantages(np.array(rewards), np.linspace(1.0, 2.0, len(rewards)), owner).any()


def test_weighted_advantages_by_hand():
    """Weights 3 and 1 on rewards 1 and 0: mean 3/4, weighted deviation sqrt(3)/4."""
    a = weighted_group_advantages(np.array([1.0, 0.0]), np.array([3.0, 1.0]), np.zeros(2, int))
    assert a == pytest.approx(np.array([0.25, -0.75]) / (np.sqrt(3) / 4 + 1e-4))


def test_leave_one_out_by_hand():
    """Each reward is held against the weighted mean of the others: weights 1, 3, 1 on rewards 1, 0, 1."""
    a = leave_one_out_advantages(np.array([1.0, 0.0, 1.0, 7.0]), np.array([1.0, 3.0, 1.0, 2.0]), np.array([0, 0, 0, 5]))
    assert a == pytest.approx([1 - 1 / 4, -1.0, 1 - 1 / 4, 0.0])


@given(groups, st.floats(0.1, 3.0))
def test_leave_one_out_does_not_see_its_own_reward(pairs, change):
    """Changing one reward moves its own advantage by as much, so its baseline did not move."""
    rewards, owner = columns(pairs)
    weights = np.linspace(0.5, 2.0, len(rewards))
    before = leave_one_out_advantages(rewards, weights, owner)
    rewards[0] += change
    moved = leave_one_out_advantages(rewards, weights, owner)[0] - before[0]
    assert moved == pytest.approx(change if (owner == owner[0]).sum() > 1 else 0.0, abs=1e-9)


@given(groups)
def test_relative_weights_are_sequence_weights_over_the_largest(pairs):
    """Within a group they are proportional to the plain weights, and the largest is one."""
    log_ratio, owner = columns(pairs)
    w, relative = sequence_weights(log_ratio), relative_weights(log_ratio, owner, clip=5.0)
    for g in np.unique(owner):
        assert relative[owner == g] == pytest.approx(w[owner == g] / w[owner == g].max())


def test_sequence_weights_are_clipped_from_above():
    """A ratio beyond the clip becomes the clip; one below is left, even where the ratio overflows."""
    w = sequence_weights(np.array([0.0, np.log(2.0), np.log(50.0), -3.0, 1e6]), clip=5.0)
    assert w == pytest.approx([1.0, 2.0, 5.0, np.exp(-3.0), 5.0])


def test_effective_sample_size_by_hand():
    """Equal weights count fully, one weight counts once, no weight counts not at all."""
    assert effective_sample_size(np.full(7, 0.3)) == pytest.approx(7)
    assert effective_sample_size(np.array([0.0, 4.0, 0.0])) == pytest.approx(1)
    assert effective_sample_size(np.array([3.0, 1.0])) == pytest.approx(1.6)
    assert effective_sample_size(np.zeros(3)) == 0
    assert effective_sample_size(np.array([])) == 0


@pytest.mark.parametrize(("rewards", "signal"), [([0.0, 1.0], True), ([1.0, 1.0], False), ([1.0], False), ([], False)])
def test_signal_is_disagreement(rewards, signal):
    """A group has a gradient only if its rewards differ."""
    assert has_signal(np.array(rewards)) is signal
