"""What is left of stored evidence, by hand, and which prompts need more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.features import projection_for, sketch_gradients
from pipeline.staleness import measure, of_rollouts, stale, staleness

seeds = st.integers(0, 10**6)


def batch(seed, drift):
    rng = np.random.default_rng(seed)
    owner = np.repeat([3, 1, 7], [4, 1, 6])
    mask = np.arange(5) < rng.integers(0, 6, len(owner))[:, None]
    old = -rng.exponential(1.0, mask.shape) * mask
    return old + drift * rng.standard_normal(mask.shape) * mask, old, mask, owner


def test_by_hand():
    """Prompt 4 has ratios 3 and 1: (3 + 1)^2 / (9 + 1) = 1.6 of 2 count; prompt 9 is as it was sampled."""
    new = np.log([[0.6, 0.5, 1.0], [0.3, 1.0, 1.0], [0.1, 0.1, 0.1]])
    old = np.log([[0.3, 0.5, 1.0], [0.3, 1.0, 1.0], [0.1, 0.1, 0.1]])
    new[0, 1], old[0, 1] = np.log(0.6), np.log(0.4)
    mask = np.array([[True, True, False], [True, False, False], [True, True, True]])
    found = staleness(new, old, mask, np.array([4, 4, 9]))
    assert found.owner.tolist() == [4, 9]
    assert found.rollouts.tolist() == [2, 1]
    assert found.effective == pytest.approx([1.6, 1.0])
    assert found.ess == pytest.approx([0.8, 1.0])
    assert found.log_ratio_max == pytest.approx([np.log(2), 0.0])
    assert found.log_ratio_p99 == pytest.approx([np.log(1.5) + 0.98 * np.log(2 / 1.5), 0.0])  # of 0, log 1.5, log 2
    assert found.lost == pytest.approx([-np.log(3) / 2, 0.0])


def test_a_weight_is_clipped():
    """A ratio of 500 counts as 5: (5 + 1)^2 / (25 + 1)."""
    found = staleness(np.log([[500.0], [1.0]]), np.zeros((2, 1)), np.ones((2, 1), bool), np.zeros(2, int))
    assert found.effective == pytest.approx([36 / 26])


@given(seeds)
def test_fresh_rollouts_count_in_full(seed):
    """At the policy that sampled, every rollout counts and nothing is lost."""
    new, _, mask, owner = batch(seed, 0.0)
    found = staleness(new, new, mask, owner)
    assert found.effective.tolist() == found.rollouts.tolist() == [1, 4, 6]
    assert not found.log_ratio_max.any() and not found.lost.any()


@given(seeds, st.floats(0.1, 400.0))
def test_between_one_and_all_rollouts_count(seed, drift):
    """However far the policy has moved, at least one rollout's worth is left, and never more than there are."""
    found = staleness(*batch(seed, drift))
    assert (found.effective >= 1 - 1e-9).all() and (found.effective <= found.rollouts + 1e-9).all()
    assert (found.log_ratio_p99 <= found.log_ratio_max + 1e-12).all()


@given(seeds)
def test_prompts_do_not_mix(seed):
    """A prompt's numbers are the same alone as among others, whatever stands where there is no token."""
    new, old, mask, owner = batch(seed, 1.0)
    whole = staleness(np.where(mask, new, np.nan), old, mask, owner)
    for i, prompt in enumerate(whole.owner):
        rows = owner == prompt
        alone = staleness(new[rows], old[rows], mask[rows], owner[rows])
        for name in ("effective", "ess", "log_ratio_max", "log_ratio_p99", "lost"):
            assert getattr(alone, name)[0] == pytest.approx(getattr(whole, name)[i])


def test_the_gradient_pass_and_a_forward_pass_say_the_same(llama, make_rollouts):
    """What a gradient pass sees on its way is what a forward pass of its own measures, in any number of passes."""
    rollouts = make_rollouts(llama, prompts=4, drift=0.5)
    seen = {}

    def watch(group, logp):
        uids, found = of_rollouts(group, logp)
        seen.update(zip(uids, found.effective, strict=True))

    sketch_gradients(llama, rollouts, "grpo_sequence", projection_for(llama, 8), micro_tokens=40, watch=watch)
    for micro_tokens in (1, 10_000):
        uids, found = measure(llama, rollouts, micro_tokens=micro_tokens)
        assert uids == list(rollouts.groups())
        assert found.effective == pytest.approx([seen[uid] for uid in uids], rel=1e-4)
    assert (found.effective < found.rollouts).all()


def test_a_broken_rollout_is_named():
    """A token without a finite log-probability is refused, with its rollout and prompt."""
    new = np.array([[0.0], [np.nan]])
    with pytest.raises(ValueError, match=r"rollout 1 of prompt 6.*not finite"):
        staleness(new, np.zeros((2, 1)), np.ones((2, 1), bool), np.array([5, 6]))


def test_the_stale_are_those_below_the_least():
    """Strictly below, poorest first, ties by identity, in whatever order they are given."""
    effective = {"d": 2.0, "c": 7.9, "b": 2.0, "a": 8.0}
    assert stale(effective, 8.0) == ["b", "d", "c"]
    assert stale(dict(reversed(effective.items())), 8.0) == ["b", "d", "c"]
    assert stale(effective, 0.0) == []
    with pytest.raises(ValueError, match=r"least = -1.*0 or more"):
        stale(effective, -1)
