"""Duplicates and contamination are found by text, and what is kept follows from identities."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decontaminate import drop_repeats, find_contaminated, find_duplicates, normalised
from pipeline.records import Prompts, canonical, prompt_uid


def pool_of(texts, source="d", verifier='{"id":"exact"}'):
    """Prompts with the given texts; a number in front of ``|`` is the ground truth."""
    records = []
    for text in texts:
        truth, _, said = text.rpartition("|")
        messages = canonical([{"role": "user", "content": said}])
        records.append((prompt_uid(messages, truth, source), messages, truth, source, "a", verifier))
    return Prompts(*zip(*records, strict=True))


def test_case_space_and_width_do_not_count():
    """Prompts that differ in case, white space or Unicode width are the same; system messages do not count."""
    system = canonical(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What IS\n\u00a0\uff12?"}]
    )
    assert normalised(system) == "what is 2?"


def test_duplicates_map_to_the_smallest_uid():
    """Of prompts with the same text the one with the smallest uid is kept."""
    pool = pool_of(["1|Hello  you", "2|hello you", "3|HELLO YOU", "4|goodbye"])
    kept = min(pool.prompt_uid[:3])
    assert find_duplicates(pool) == {uid: kept for uid in sorted(pool.prompt_uid[:3]) if uid != kept}


@given(st.lists(st.sampled_from(["1|a b", "2|A  b", "3|a b", "1|c", "2|C", "5|other text"]), min_size=1), st.randoms())
@settings(max_examples=50, deadline=None)
def test_order_changes_nothing(texts, random):
    """Reordering the pool changes neither the duplicates nor what is kept."""
    shuffled = list(texts)
    random.shuffle(shuffled)
    assert find_duplicates(pool_of(texts)) == find_duplicates(pool_of(shuffled))
    assert set(drop_repeats(pool_of(texts))[0].prompt_uid) == set(drop_repeats(pool_of(shuffled))[0].prompt_uid)


def test_exact_repeats_are_dropped_and_counted():
    """One row a uid is kept, in order, whichever row comes first."""
    pool = pool_of(["1|a", "1|b", "1|a"])
    other = pool_of(["1|a"], verifier='{"id":"A"}')
    kept, dropped = drop_repeats(pool)
    assert (kept, dropped) == (pool.take([0, 1]), 1)
    assert find_duplicates(pool) == {}
    for order in ([pool, other], [other, pool]):
        kept, dropped = drop_repeats(Prompts.concat(order))
        assert dropped == 2
        assert kept.verifier[kept.rows_of(other.prompt_uid)[0]] == '{"id":"A"}'


def test_contamination_names_the_held_out_set():
    """A prompt with the text of a held-out prompt is named with that set, whatever its source and answer."""
    pool = pool_of(["1|a b", "1|c", "1|d"])
    held_out = {"val": pool_of(["2|A  B"], "v"), "test": pool_of(["1|c", "7|a b"], "t")}
    assert find_contaminated(pool, held_out) == dict(
        sorted({pool.prompt_uid[0]: "test", pool.prompt_uid[1]: "test"}.items())
    )
    assert find_contaminated(pool, {"val": held_out["val"]}) == {pool.prompt_uid[0]: "val"}
    assert find_contaminated(pool, {}) == {}


def test_near_duplicates_on_request():
    """With ``near`` a small edit is a duplicate too, and whatever it stands for maps to a kept prompt."""
    long = "A train leaves the station at nine and travels two hundred miles before noon. How fast is it?"
    pool = pool_of([f"1|{long}", f"1|{long}!", f"2|{long.upper()}", "1|Name the capital of France, please."])
    assert len(find_duplicates(pool)) == 1
    repeats = find_duplicates(pool, near=0.9)
    assert len(repeats) == 2
    assert set(repeats.values()) == {min(pool.prompt_uid[:3])}
    held_out = {"test": pool_of([f"9|{long}?"])}
    assert find_contaminated(pool, held_out) == {}
    assert set(find_contaminated(pool, held_out, near=0.9)) == set(pool.prompt_uid[:3])


def test_near_one_is_equality_of_grams():
    """A cosine of one finds prompts of equal 5-grams in spite of rounding, and many prompts are compared in blocks."""
    pool = pool_of([f"{i}|{'abcdefgh' * 4} {i % 300:04d} {'xyz' * (i % 300)}" for i in range(600)])
    assert find_duplicates(pool, near=1.0) == find_duplicates(pool)
    assert len(find_duplicates(pool)) == 300


def test_near_must_be_a_cosine():
    """A threshold that is no cosine is refused."""
    with pytest.raises(ValueError, match="near = 2"):
        find_duplicates(pool_of(["1|a"]), near=2)
