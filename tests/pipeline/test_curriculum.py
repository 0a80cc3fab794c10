"""From scores to stages: reasons, budgets, floors, and independence of order."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.curriculum import CODE, DRAWN, NONE, candidates, overlap, select_at_random, select_by_influence
from pipeline.records import REASONS, keyed_seed

sizes = st.integers(1, 30)
shares = st.floats(0, 1)


def pool(size):
    return [f"prompt-{i:02}" for i in range(size)]


def scored(size, seed, levels=5):
    """A part of the pool with cosines on a few levels, so that ties happen; the rest excluded with a reason."""
    rng = np.random.default_rng(seed)
    reasons = rng.choice([CODE["unseen"], CODE["no_signal"], CODE["prior"]], size)
    excluded = np.where(rng.random(size) < 0.7, NONE, reasons).astype(np.int8)
    some = np.flatnonzero(excluded == NONE)
    return pool(size), excluded, some, rng.integers(-levels, levels + 1, (len(some), 2)) / levels


def told_of(uids, stage):
    """A selection by prompt_uid: reasons, chosen, what drew them, fused scores of the scored."""
    reason = dict(zip(uids, (REASONS[code] for code in stage.reason), strict=True))
    fused = {uid: value for uid, value in zip(uids, stage.fused.tolist(), strict=True) if value == value}
    return reason, [uids[i] for i in stage.chosen], [DRAWN[i] for i in stage.drawn], fused


@given(sizes, st.integers(0, 99), st.integers(0, 40), shares)
def test_every_prompt_has_one_reason(size, seed, budget, floor):
    """Each prompt of the pool has one known code; those selected are the chosen ones, once each, within budget."""
    uids, excluded, some, cosines = scored(size, seed)
    told = select_by_influence(uids, excluded, some, cosines, budget=budget, floor=floor, seed=seed)
    assert len(told.reason) == len(told.fused) == size
    assert set(np.flatnonzero(told.reason == CODE["selected"])) == set(told.chosen)
    assert len(set(told.chosen)) == len(told.chosen) == len(told.drawn) == min(budget, size)
    left = np.where(excluded == NONE, CODE["budget"], excluded)
    assert ((told.reason == CODE["selected"]) | (told.reason == left)).all()


@given(sizes, st.integers(0, 99), st.integers(0, 40), shares)
def test_the_floor_has_its_share(size, seed, budget, floor):
    """At least the floor's share of the stage is drawn at random; the rest are the best by fused influence."""
    uids, excluded, some, cosines = scored(size, seed)
    told = select_by_influence(uids, excluded, some, cosines, budget=budget, floor=floor, seed=seed)
    best, drawn = told.chosen[told.drawn == 0], told.chosen[told.drawn == 1]
    assert len(drawn) >= int(floor * min(budget, size))
    assert len(best) + len(drawn) == len(told.drawn)
    values = told.fused[best].tolist()
    assert values == sorted(values, reverse=True)
    assert all(told.fused[row] <= min(values) for row in some if row not in best and values)


@given(sizes, st.integers(0, 99), st.integers(0, 40), shares, st.randoms())
def test_a_stage_does_not_depend_on_order(size, seed, budget, floor, random):
    """Reordering the pool and the scores, ties included, changes neither who is chosen nor in what order."""
    uids, excluded, some, cosines = scored(size, seed)
    settings = {"budget": budget, "floor": floor, "seed": seed}
    one = told_of(uids, select_by_influence(uids, excluded, some, cosines, **settings))
    moved, rows = list(range(size)), list(range(len(some)))
    random.shuffle(rows)
    random.shuffle(moved)
    others, place = [uids[i] for i in moved], np.argsort(moved)
    other = select_by_influence(others, excluded[moved], place[some[rows]], cosines[rows], **settings)
    assert told_of(others, other) == one


def test_a_stage_by_hand():
    """Two targets, budget two, no floor: the prompt that is first once and the runner-up of both."""
    cosines = np.array([[0.9, -1.0], [0.8, 0.7], [0.1, 0.6], [-0.5, 0.9]])
    excluded = np.array([NONE] * 4 + [CODE["unseen"]], np.int8)
    stage = select_by_influence(pool(5), excluded, np.arange(4), cosines, budget=2, floor=0.0, seed=0)
    reason, chosen, drawn, fused = told_of(pool(5), stage)
    assert fused == {"prompt-00": 1.0, "prompt-01": 1.0, "prompt-02": 0.0, "prompt-03": 1.0}
    assert set(chosen) < {"prompt-00", "prompt-01", "prompt-03"}
    assert drawn == ["influence"] * 2
    assert reason["prompt-02"] == "budget"
    assert reason["prompt-04"] == "unseen"


def select_slowly(uids, excluded, scored, cosines, *, budget, floor, seed):
    """The same stage from dictionaries of prompt_uids, one prompt at a time."""
    ties = {uid: keyed_seed("uniform", keyed_seed("ties", seed), uid) for uid in scored}
    fused = dict.fromkeys(scored, 0.0)
    for target in range(cosines.shape[1]):
        value = dict(zip(scored, cosines[:, target], strict=True))
        for rank, uid in enumerate(sorted(scored, key=lambda uid: (-value[uid], ties[uid])), 1):
            fused[uid] += 1 / rank if rank <= budget else 0.0
    size = min(budget, len(uids))
    best = sorted((uid for uid in scored if fused[uid] > 0), key=lambda uid: (-fused[uid], ties[uid]))
    best = best[: size - int(floor * size)]
    rest = [uid for uid in uids if uid not in best]
    rest.sort(key=lambda uid: keyed_seed("uniform", keyed_seed("floor", seed), uid))
    chosen = best + rest[: size - len(best)]
    reason = {uid: "selected" if uid in chosen else excluded.get(uid, "budget") for uid in uids}
    return reason, chosen, ["influence"] * len(best) + ["floor"] * (len(chosen) - len(best)), fused


@given(sizes, st.integers(0, 99), st.integers(0, 40), shares, st.booleans())
def test_columns_select_as_dictionaries_do(size, seed, budget, floor, arrow):
    """From lists or Arrow columns, reasons, order and fused scores are those of a slow selection by prompt_uid."""
    uids, excluded, some, cosines = scored(size, seed)
    settings = {"budget": budget, "floor": floor, "seed": seed}
    found = select_by_influence(pa.array(uids) if arrow else uids, excluded, some, cosines, **settings)
    out = {uid: REASONS[code] for uid, code in zip(uids, excluded, strict=True) if code != NONE}
    assert told_of(uids, found) == select_slowly(uids, out, [uids[i] for i in some], cosines, **settings)


@given(sizes, st.integers(0, 5), st.integers(0, 30), st.integers(0, 30), st.randoms())
def test_random_stages_are_nested_and_keyed(size, seed, small, more, random):
    """A larger budget selects a superset, in the same order, whatever the order of the pool."""
    uids = pool(size)
    one = told_of(uids, select_at_random(uids, budget=small, seed=seed))
    random.shuffle(uids)
    other = told_of(uids, select_at_random(uids, budget=small + more, seed=seed))
    assert other[1][: len(one[1])] == one[1]
    assert len(one[1]) == min(small, size)
    assert set(one[0].values()) <= {"selected", "budget"}
    assert set(one[2]) <= {"shuffle"} and one[3] == {}


def test_candidates_by_hand():
    """Unseen and signal-less prompts leave with their reason; of the rest the difficulty weight keeps the share."""
    seen, signal = np.array([False, True, True, True, True, True]), np.array([False, True, False, True, True, True])
    alpha = np.array([1.0, 9.0, 1.0, 4.0, 5.0, 1.0])
    beta = np.array([1.0, 1.0, 9.0, 6.0, 5.0, 9.0])
    told = candidates(pool(6), alpha, beta, seen, signal, share=1 / 3, mu=0.3, eta=3.0)
    names = [REASONS[code] if code != NONE else None for code in told]
    assert names == ["unseen", "prior", "no_signal", None, None, "prior"]


@given(sizes, st.integers(0, 99), shares, st.randoms())
def test_candidates_do_not_depend_on_order(size, seed, share, random):
    """Reordering the pool changes no reason, ties included, and at least one prompt with signal stays."""
    rng = np.random.default_rng(seed)
    seen = rng.random(size) < 0.8
    signal = seen & (rng.random(size) < 0.7)
    alpha, beta = rng.integers(1, 4, (2, size)).astype(float)
    order = list(range(size))
    random.shuffle(order)

    def told(rows):
        uids = [pool(size)[i] for i in rows]
        return candidates(
            uids, alpha[rows], beta[rows], seen[rows], signal[rows], share=share, mu=0.3, eta=3.0
        )  # fmt: skip

    one = told(list(range(size)))
    assert (told(order) == one[order]).all()
    assert (one == NONE).sum() == min(signal.sum(), max(1, int(share * size)))


def test_overlap_by_hand():
    """The share of a stage that is also in another, a row a stage."""
    assert overlap([["a", "b"], ["b", "c", "d", "e"]]) == pytest.approx(np.array([[1.0, 0.5], [0.25, 1.0]]))
