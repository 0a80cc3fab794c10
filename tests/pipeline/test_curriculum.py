"""From scores to stages: reasons, budgets, floors, and independence of order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.curriculum import candidates, overlap, select_at_random, select_by_influence
from pipeline.records import REASONS

sizes = st.integers(1, 30)
shares = st.floats(0, 1)


def pool(size):
    return [f"prompt-{i:02}" for i in range(size)]


def scored(size, seed, levels=5):
    """A part of the pool with cosines on a few levels, so that ties happen; the rest excluded with a reason."""
    rng = np.random.default_rng(seed)
    uids = pool(size)
    inside = rng.random(size) < 0.7
    some = [uid for uid, yes in zip(uids, inside, strict=True) if yes]
    excluded = {uid: str(rng.choice(["unseen", "no_signal", "prior"])) for uid in uids if uid not in some}
    return uids, excluded, some, rng.integers(-levels, levels + 1, (len(some), 2)) / levels


@given(sizes, st.integers(0, 99), st.integers(0, 40), shares)
def test_every_prompt_has_one_reason(size, seed, budget, floor):
    """Each prompt of the pool has one known code; those selected are the chosen ones, once each, within budget."""
    uids, excluded, some, cosines = scored(size, seed)
    told = select_by_influence(uids, excluded, some, cosines, budget=budget, floor=floor, seed=seed)
    assert set(told.reason) == set(uids)
    assert set(told.reason.values()) <= set(REASONS)
    assert {uid for uid, reason in told.reason.items() if reason == "selected"} == set(told.chosen)
    assert len(set(told.chosen)) == len(told.chosen) == len(told.drawn) == min(budget, size)
    assert all(told.reason[uid] in ("selected", excluded.get(uid, "budget")) for uid in uids)


@given(sizes, st.integers(0, 99), st.integers(0, 40), shares)
def test_the_floor_has_its_share(size, seed, budget, floor):
    """At least the floor's share of the stage is drawn at random; the rest are the best by fused influence."""
    uids, excluded, some, cosines = scored(size, seed)
    told = select_by_influence(uids, excluded, some, cosines, budget=budget, floor=floor, seed=seed)
    best = [uid for uid, how in zip(told.chosen, told.drawn, strict=True) if how == "influence"]
    assert told.drawn.count("floor") >= int(floor * min(budget, size))
    assert len(best) + told.drawn.count("floor") == len(told.drawn)
    values = [told.fused[uid] for uid in best]
    assert values == sorted(values, reverse=True)
    assert all(told.fused[uid] <= min(values) for uid in some if uid not in best and values)


@given(sizes, st.integers(0, 99), st.integers(0, 40), shares, st.randoms())
def test_a_stage_does_not_depend_on_order(size, seed, budget, floor, random):
    """Reordering the pool and the scores, ties included, changes neither who is chosen nor in what order."""
    uids, excluded, some, cosines = scored(size, seed)
    settings = {"budget": budget, "floor": floor, "seed": seed}
    one = select_by_influence(uids, excluded, some, cosines, **settings)
    rows = list(range(len(some)))
    random.shuffle(rows)
    random.shuffle(uids)
    other = select_by_influence(uids, excluded, [some[i] for i in rows], cosines[rows], **settings)
    assert other == one


def test_a_stage_by_hand():
    """Two targets, budget two, no floor: the prompt that is first once and the runner-up of both."""
    cosines = np.array([[0.9, -1.0], [0.8, 0.7], [0.1, 0.6], [-0.5, 0.9]])
    told = select_by_influence(pool(5), {"prompt-04": "unseen"}, pool(4), cosines, budget=2, floor=0.0, seed=0)
    assert told.fused == {"prompt-00": 1.0, "prompt-01": 1.0, "prompt-02": 0.0, "prompt-03": 1.0}
    assert set(told.chosen) < {"prompt-00", "prompt-01", "prompt-03"}
    assert told.drawn == ["influence"] * 2
    assert told.reason["prompt-02"] == "budget"
    assert told.reason["prompt-04"] == "unseen"


@given(sizes, st.integers(0, 5), st.integers(0, 30), st.integers(0, 30), st.randoms())
def test_random_stages_are_nested_and_keyed(size, seed, small, more, random):
    """A larger budget selects a superset, in the same order, whatever the order of the pool."""
    uids = pool(size)
    one = select_at_random(uids, budget=small, seed=seed)
    random.shuffle(uids)
    other = select_at_random(uids, budget=small + more, seed=seed)
    assert other.chosen[: len(one.chosen)] == one.chosen
    assert len(one.chosen) == min(small, size)
    assert set(one.reason.values()) <= {"selected", "budget"}


def test_candidates_by_hand():
    """Unseen and signal-less prompts leave with their reason; of the rest the difficulty weight keeps the share."""
    uids = pool(6)
    signal = {uids[1]: True, uids[2]: False, uids[3]: True, uids[4]: True, uids[5]: True}
    alpha = np.array([1.0, 9.0, 1.0, 4.0, 5.0, 1.0])
    beta = np.array([1.0, 1.0, 9.0, 6.0, 5.0, 9.0])
    told = candidates(uids, alpha, beta, signal, share=1 / 3, mu=0.3, eta=3.0)
    assert told == {uids[0]: "unseen", uids[2]: "no_signal", uids[1]: "prior", uids[5]: "prior"}


@given(sizes, st.integers(0, 99), shares, st.randoms())
def test_candidates_do_not_depend_on_order(size, seed, share, random):
    """Reordering the pool changes no reason, ties included, and at least one prompt with signal stays."""
    rng = np.random.default_rng(seed)
    uids = pool(size)
    belief = {uid: rng.integers(1, 4, 2).astype(float) for uid in uids}
    signal = {uid: bool(rng.random() < 0.7) for uid in uids if rng.random() < 0.8}

    def told(order):
        alpha, beta = np.array([belief[uid] for uid in order]).T
        return candidates(order, alpha, beta, signal, share=share, mu=0.3, eta=3.0)

    one = told(uids)
    random.shuffle(uids)
    assert told(uids) == one
    kept = [uid for uid in uids if uid not in one]
    assert len(kept) == min(sum(signal.values()), max(1, int(share * size)))


def test_overlap_by_hand():
    """The share of a stage that is also in another, a row a stage."""
    assert overlap([["a", "b"], ["b", "c", "d", "e"]]) == pytest.approx(np.array([[1.0, 0.5], [0.25, 1.0]]))
