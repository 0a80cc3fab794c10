"""Scored completions, streamed from a scripted engine."""

import numpy as np
import pytest

from pipeline.embedded.warm_start import character_tokenizer
from pipeline.generation import Group, Sampling
from pipeline.records import Rollouts
from pipeline.rollouts import collect, match
from pipeline.verifiers import Verdict

PAIRS = [("1+1=", "2"), ("2+2=", "4")]
TOKENIZER = character_tokenizer()


def scripted(requests, sampling):
    """Answers 2, 3 and a cut-off 2 and 3 to each prompt, last prompt first."""
    two, three = TOKENIZER("2").input_ids, TOKENIZER("3").input_ids
    for request in reversed(requests):
        yield Group(
            request,
            [[*two, 1], [*three, 1], two, three],
            [np.array([-1.0, -2.0]), np.array([-3.0, -4.0]), np.array([-1.0]), np.array([-3.0])],
            ["stop", "stop", "length", "length"],
        )


def score(triples):
    return [Verdict(*(("correct", 1.0) if truth == text else ("incorrect", 0.0))) for _, truth, text in triples]


@pytest.fixture
def collected(make_prompts):
    """The two groups of two prompts."""
    prompts = make_prompts(PAIRS)
    groups = collect(
        prompts, scripted, score, TOKENIZER,
        rollouts=4, sampling=Sampling(temperature=0.7, max_new_tokens=2), seed=3, policy="key", step=9,
    )  # fmt: skip
    return prompts, list(groups)


def test_groups_carry_what_was_sampled(collected):
    """Each group holds its prompt, tokens, log-probabilities, text and provenance, as the engine gave them."""
    prompts, groups = collected
    assert [group.prompt_uid[0] for group in groups] == list(reversed(prompts.prompt_uid))
    first = groups[-1]
    assert first.text == ("2", "3", "2", "3")
    assert first.sample == (0, 1, 2, 3)
    assert first.prompt_ids[0] == tuple(TOKENIZER("1+1=").input_ids)
    assert first.completion_ids[0][-1] == 1
    assert first.logp_old[1] == [-3.0, -4.0]
    assert {*first.policy, *first.step, *first.seed, *first.temperature} == {"key", 9, 3, 0.7}


def test_a_cut_off_completion_is_not_called_wrong(collected):
    """A completion at the length limit is ``truncated`` unless it is right; its reward stays what it was."""
    _, groups = collected
    assert groups[-1].verdict == ("correct", "incorrect", "correct", "truncated")
    assert groups[-1].reward == (1.0, 0.0, 1.0, 0.0)
    assert groups[0].verdict == ("incorrect", "incorrect", "truncated", "truncated")


def test_rollouts_of_other_prompts_are_left_out(collected, make_prompts):
    """Rollouts are matched to the pool by prompt_uid; if none belongs, the refusal says how the uid is made."""
    prompts, groups = collected
    rollouts = Rollouts.concat(groups)
    one = prompts.take([1])
    assert set(match(rollouts, one).prompt_uid) == set(one.prompt_uid)
    assert match(rollouts, prompts) == rollouts
    with pytest.raises(ValueError, match="none of the 8 imported rollouts"):
        match(rollouts, make_prompts([("9+9=", "18")]))
