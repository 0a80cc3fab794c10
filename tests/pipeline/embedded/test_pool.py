"""The embedded prompt sets, with a policy that makes one kind of mistake."""

from collections import Counter

import pytest

from pipeline.embedded import pool
from pipeline.embedded.families import without_carry
from pipeline.generation import Group


class Careless:
    """An engine that gives every prompt the answer without carries, eleven times in sixteen, and else nonsense."""

    def __init__(self, policy):
        self.tokenizer = policy.tokenizer

    def __call__(self, requests, sampling):
        for r in requests:
            answer = self.tokenizer(without_carry(r.prompt_uid)).input_ids
            said = [[*answer, 1]] * 11 + [[2] * 6] * 5
            yield Group(r, said, [], ["stop"] * 11 + ["length"] * 5)


@pytest.fixture
def sets(llama, monkeypatch):
    """The sets of seed 0."""
    monkeypatch.setattr(pool, "TransformersGenerate", Careless)
    return pool.make_sets(llama, 0)


def test_sets_have_their_sizes(sets):
    """The pool has 800 prompts in the stated mix; validation and test sets are of one family or half of each."""
    assert Counter(sets["pool"]["ability"]) == pool.POOL | pool.WRONG
    assert len(sets["pool"]["prompt"]) == 800
    assert set(sets["validation_add"]["ability"]) == {"add"}
    assert len(sets["validation_sub"]["prompt"]) == pool.VALIDATION
    assert Counter(sets["test"]["ability"]) == {"add": pool.TEST, "sub": pool.TEST}


def test_no_prompt_is_in_two_sets(sets):
    """All prompts of all sets differ."""
    prompts = [prompt for rows in sets.values() for prompt in rows["prompt"]]
    assert len(set(prompts)) == len(prompts)


def test_wrong_labels_are_the_policys_own(sets):
    """The labels of nmod are the policy's most frequent finished mistake, those of noisy drop the carries."""
    rows = zip(*(sets["pool"][name] for name in ("prompt", "ground_truth", "ability")), strict=True)
    for prompt, label, family in rows:
        if family in pool.WRONG:
            assert label == without_carry(prompt)


def test_sets_are_a_function_of_the_seed(sets, llama, monkeypatch):
    """The same seed makes the same sets, another one others."""
    assert pool.make_sets(llama, 0) == sets
    assert pool.make_sets(llama, 1)["test"] != sets["test"]
