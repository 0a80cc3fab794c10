"""DIEM's weights: the identity of the literal rule, and what departs from it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.advantages import effective_sample_size
from pipeline.reweight import diagnose, diem_weights, permuted, temper, temper_to_floor

seeds = st.integers(0, 10**6)
sizes = st.integers(1, 8)


def gradients(seed, prompts, dim=40):
    return np.random.default_rng(seed).standard_normal((prompts, dim))


@given(seeds, sizes, st.floats(1e-6, 1e6))
def test_the_literal_reference_is_plain_grpo(seed, prompts, scale):
    """Measured against its own batch gradient, every batch gets weights of one to 1e-9, whatever the step size."""
    G = gradients(seed, prompts)
    P = G @ G.T
    assert diem_weights(P, scale * P.sum(axis=1)) == pytest.approx(np.ones(prompts), abs=1e-9)


@given(seeds, sizes)
def test_weights_are_least_squares_coefficients(seed, prompts):
    """Against any reference, undamped and unclipped weights are its rescaled least-squares coefficients."""
    G, reference = gradients(seed, prompts), gradients(seed + 1, 1)[0]
    W = diem_weights(G @ G.T, G @ reference, clip=False)
    expected = np.linalg.lstsq(G.T, reference, rcond=None)[0]
    assert W / np.linalg.norm(W) == pytest.approx(expected / np.linalg.norm(expected), abs=1e-8)


@given(seeds, sizes, st.floats(0, 10), st.booleans())
def test_the_length_of_the_update_is_kept(seed, prompts, ridge, clip):
    """After the clip the weighted update is as long as the plain one."""
    G, reference = gradients(seed, prompts), gradients(seed + 1, 1)[0]
    W = diem_weights(G @ G.T, G @ reference, ridge=ridge, clip=clip)
    assert np.linalg.norm(W @ G) == pytest.approx(np.linalg.norm(G.sum(axis=0)), rel=1e-9)
    assert not clip or W.min() >= 0


@given(seeds, sizes, st.floats(1e-5, 1e5), st.floats(1e-5, 1e5), st.floats(0, 10))
def test_scales_cancel(seed, prompts, gradient_scale, importance_scale, ridge):
    """Neither the scale of the importance nor that of the gradients changes a weight, with or without a ridge."""
    G, reference = gradients(seed, prompts), gradients(seed + 1, 1)[0]
    W = diem_weights(G @ G.T, G @ reference, ridge=ridge)
    H = gradient_scale * G
    assert diem_weights(H @ H.T, importance_scale * H @ reference, ridge=ridge) == pytest.approx(W, rel=1e-6, abs=1e-8)


@given(seeds, st.floats(0, 1))
def test_prompts_without_gradient_stand_aside(seed, ridge):
    """A zero gradient keeps weight one, and the others get the weights that they get without it."""
    G, reference = gradients(seed, 5), gradients(seed + 1, 1)[0]
    G[[1, 3]] = 0
    rest = G[[0, 2, 4]]
    W = diem_weights(G @ G.T, G @ reference, ridge=ridge)
    assert W[[1, 3]].tolist() == [1.0, 1.0]
    assert W[[0, 2, 4]] == pytest.approx(diem_weights(rest @ rest.T, rest @ reference, ridge=ridge), rel=1e-9)


@given(seeds, sizes)
def test_duplicates_share_a_weight(seed, prompts):
    """Copies of a prompt get equal, finite weights, and the update keeps the direction that it has without them."""
    G, reference = gradients(seed, prompts), gradients(seed + 1, 1)[0]
    double = np.concatenate([G, G[:1]])
    W = diem_weights(double @ double.T, double @ reference, clip=False)
    assert W[0] == pytest.approx(W[-1], rel=1e-6)
    update, single = W @ double, diem_weights(G @ G.T, G @ reference, clip=False) @ G
    assert update / np.linalg.norm(update) == pytest.approx(single / np.linalg.norm(single), abs=1e-8)


def test_the_ridge_tends_to_importance_weights():
    """A very large ridge leaves weights proportional to the importance."""
    G, reference = gradients(0, 6), gradients(1, 1)[0]
    importance = G @ reference
    W = diem_weights(G @ G.T, importance, ridge=1e9, clip=False)
    assert W / np.linalg.norm(W) == pytest.approx(importance / np.linalg.norm(importance), abs=1e-6)


def test_weights_by_hand():
    """Orthogonal gradients: importance over squared length, the opposed one cut, the length restored."""
    P, importance = np.diag([1.0, 4.0, 1.0]), np.array([2.0, 4.0, -3.0])
    # v = (2, 1, -3) -> (2, 1, 0); v P v = 8; C = 6
    assert diem_weights(P, importance) == pytest.approx(np.array([2.0, 1.0, 0.0]) * np.sqrt(6 / 8))


def test_a_batch_that_opposes_the_reference_is_left_alone():
    """Where no weight survives the clip, or there is no gradient at all, every weight is one."""
    assert diem_weights(np.eye(3), -np.ones(3)).tolist() == [1.0, 1.0, 1.0]
    assert diem_weights(np.zeros((2, 2)), np.zeros(2)).tolist() == [1.0, 1.0]
    assert len(diem_weights(np.zeros((0, 0)), np.zeros(0))) == 0


@pytest.mark.parametrize(
    ("gram", "importance", "ridge", "message"),
    [
        (np.full((2, 2), np.nan), np.ones(2), 0.0, "NaN"),
        (np.eye(2), np.array([1.0, np.inf]), 0.0, "infinity"),
        (np.eye(2), np.ones(2), -0.1, "ridge = -0.1"),
    ],
)
def test_impossible_input_is_refused(gram, importance, ridge, message):
    """NaN, infinity and a negative ridge are refused."""
    with pytest.raises(ValueError, match=message):
        diem_weights(gram, importance, ridge=ridge)


def test_temper_by_hand():
    """A quarter of the way from one to the weights; a strength that is no share is refused."""
    assert temper(np.array([0.0, 1.0, 5.0]), 0.25).tolist() == [0.75, 1.0, 2.0]
    assert temper(np.array([0.0, 5.0]), 0.0).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"strength = 1\.5"):
        temper(np.ones(1), 1.5)


def test_diagnosis_by_hand():
    """What the weights did, in numbers that a hand can check; a prompt without gradient is not counted."""
    gram, raw, used = np.diag([1.0, 4.0, 0.0]), np.array([2.0, 0.0, 1.0]), np.array([1.5, 0.5, 1.0])
    told = diagnose(gram, raw, used, ridge=0.2)
    assert told.deviation == 0.5
    assert told.negatives == 1
    assert told.effective_samples == pytest.approx(2.0**2 / (1.5**2 + 0.5**2))
    assert told.cosine_to_plain == pytest.approx((1.5 + 4 * 0.5) / np.sqrt(5 * (1.5**2 + 4 * 0.5**2)))
    assert told.condition == pytest.approx((4 + 0.5) / (1 + 0.5))
    assert not told.identity
    assert diagnose(gram, raw, np.ones(3), ridge=0.0).identity
    assert told.strength == pytest.approx(0.5)
    assert told.length == pytest.approx(np.sqrt((1.5**2 + 4 * 0.5**2) / 5))
    assert diagnose(gram, np.ones(3), np.ones(3), ridge=0.0).strength == 0.0


@pytest.mark.parametrize(("longest", "acts"), [(np.inf, True), (2.2, True), (1.7, False)])
def test_a_clipped_gradient_leaves_the_norm_nothing_to_do(longest, acts):
    """Plain update of length sqrt 5 = 2.24, weighted of sqrt 3.25 = 1.80: below both, the clip makes them equal."""
    gram, raw, used = np.diag([1.0, 4.0, 0.0]), np.array([2.0, 0.0, 1.0]), np.array([1.5, 0.5, 1.0])
    assert diagnose(gram, raw, used, ridge=0.0, longest=longest).norm_acts is acts


def test_a_floor_by_hand():
    """W = (0, 2): with a, ESS = 2 / (1 + a^2), so four fifths of two samples are kept up to a = 1/2, and no further."""
    W, active = np.array([0.0, 1.0, 2.0]), np.array([True, False, True])
    used, strength = temper_to_floor(W, active, 1.0, 0.8)
    assert strength == pytest.approx(0.5)
    assert used == pytest.approx(np.array([0.5, 1.0, 1.5]))
    assert effective_sample_size(used[active]) == pytest.approx(0.8 * 2)
    assert temper_to_floor(W, active, 0.25, 0.8)[1] == 0.25
    assert temper_to_floor(W, active, 1.0, 1.0)[0].tolist() == [1.0, 1.0, 1.0]
    assert temper_to_floor(W, ~active, 1.0, 0.9)[1] == 1.0
    assert temper_to_floor(np.empty(0), np.empty(0, bool), 0.5, 0.9) == (pytest.approx([]), 0.5)


@given(seeds, sizes, st.floats(0, 1), st.floats(0, 1))
def test_a_floor_takes_the_largest_strength_that_keeps_it(seed, prompts, strength, floor):
    """The effective sample size is kept; a search over strengths finds none that is larger and keeps it too."""
    G, reference = gradients(seed, prompts + 2), gradients(seed + 1, 1)[0]
    G[0] = 0
    active = np.diag(G @ G.T) > 0
    W = diem_weights(G @ G.T, G @ reference, ridge=0.1)
    used, kept = temper_to_floor(W, active, strength, floor)
    assert used == pytest.approx(temper(W, kept))
    assert effective_sample_size(used[active]) >= floor * active.sum() - 1e-9
    larger = np.linspace(kept, strength, 20)[1:] if kept < strength else []
    assert all(effective_sample_size(temper(W, a)[active]) < floor * active.sum() + 1e-9 for a in larger)


@pytest.mark.parametrize(
    ("weights", "strength", "floor", "message"),
    [
        (np.ones(2), 0.5, 1.5, r"floor = 1\.5"),
        (np.ones(2), -0.1, 0.5, r"strength = -0\.1"),
        (np.array([-1.0, 1.0]), 0.5, 0.5, r"a weight is -1\.0"),
    ],
)
def test_an_impossible_floor_is_refused(weights, strength, floor, message):
    """A floor or strength that is no share, and weights with a sign, are refused."""
    with pytest.raises(ValueError, match=message):
        temper_to_floor(weights, np.ones(2, bool), strength, floor)


@given(seeds, st.integers(2, 9))
def test_permuted_weights_are_the_same_weights(seed, prompts):
    """The active weights are shuffled among themselves, the others stay, and equal seeds give equal orders."""
    W = np.random.default_rng(seed).exponential(size=prompts)
    active = np.arange(prompts) % 3 != 0
    other = permuted(W, active, seed, "step", 1)
    assert sorted(other[active]) == sorted(W[active])
    assert other[~active].tolist() == W[~active].tolist()
    assert other.tolist() == permuted(W, active, seed, "step", 1).tolist()


def test_permuted_weights_follow_the_seed():
    """Every order of three weights turns up over the seeds."""
    orders = {tuple(permuted(np.array([0.0, 1.0, 3.0]), np.ones(3, bool), seed)) for seed in range(60)}
    assert len(orders) == 6
