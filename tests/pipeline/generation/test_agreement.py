"""The comparison of an engine with its policy: what it judges by, what it lets pass, what it costs."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.generation import Group, Request, Sampling
from pipeline.generation.agreement import Checked, differences
from pipeline.generation.transformers import TransformersGenerate
from pipeline.policy import Policy

GREEDY = Sampling(temperature=0.0, max_new_tokens=4)


def asked(n: int, rollouts: int = 1) -> list[Request]:
    return [Request(f"p{i}", (2, 3 + i % 20, 4), rollouts, i) for i in range(n)]


class Shifted:
    """Transformers, whose log-probabilities are then off by so much, in the first ``groups`` groups or in all."""

    def __init__(self, policy: Policy, by: float, groups: float = math.inf) -> None:
        self.generate, self.by, self.groups = TransformersGenerate(policy), by, groups

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        for i, group in enumerate(self.generate(requests, sampling)):
            yield replace(group, logp=[x - self.by * (i < self.groups) for x in group.logp])


def test_one_short_answer_is_no_evidence(sampled):
    """In bfloat16 a first answer of at most four tokens that is off by .06 is no alarm, where the mean of 64 is within .05."""
    half = Policy(copy.deepcopy(sampled.model).to(torch.bfloat16), sampled.tokenizer)
    assert len(list(Checked(Shifted(half, 0.06, groups=1), half, "it")(asked(20), GREEDY))) == 20
    with pytest.raises(ValueError, match=r"it does not sample from this policy.*bfloat16 explains 0.05"):
        next(Checked(Shifted(half, 0.1), half, "it")(asked(40), GREEDY))


@pytest.mark.parametrize(("prompts", "refused"), [(3, False), (16, True)])
def test_what_a_call_has_is_judged_at_its_end(sampled, prompts, refused):
    """A call that ends before 64 tokens is judged if it has 16, and passes whole if it has fewer."""
    engine = Checked(Shifted(sampled, 0.1), sampled, "it")
    if refused:
        with pytest.raises(ValueError, match=r"off by 0\.1 nats"):
            next(engine(asked(prompts), replace(GREEDY, max_new_tokens=3)))
    else:
        assert len(list(engine(asked(prompts), GREEDY))) == prompts


def test_no_group_is_handed_over_before_it_is_judged(sampled):
    """Of an engine that is refused no group comes out; of another each does, once and in the engine's order."""
    handed = []
    with pytest.raises(ValueError, match="does not sample"):
        handed.extend(Checked(Shifted(sampled, 0.1), sampled, "it")(asked(40), GREEDY))
    assert handed == []
    expected = [g.request.prompt_uid for g in TransformersGenerate(sampled)(asked(40), GREEDY)]
    found = list(Checked(TransformersGenerate(sampled), sampled, "it")(asked(40), GREEDY))
    assert [g.request.prompt_uid for g in found] == expected


def test_the_pass_is_bounded_whatever_the_group(sampled, monkeypatch):
    """Of a group of thirty completions of 300 tokens, two of 256 are compared: no larger logits are made."""
    shapes = []
    forward = sampled.model.forward

    def spy(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        shapes.append(tuple(output.logits.shape))
        return output

    monkeypatch.setattr(sampled.model, "forward", spy)
    group = Group(Request("p", (2, 3), 30, 0), [[5] * 300] * 30, [np.zeros(300, np.float32)] * 30, ["length"] * 30)
    assert differences(sampled, group, Sampling()).shape == (512,)
    assert shapes == [(2, 257, 27)]
