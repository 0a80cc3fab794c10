"""Dot scores from forward passes, against the inner products of gradients that were really formed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from pipeline.directional import dot_scores, target_direction
from pipeline.embedded.warm_start import untrained_policy
from pipeline.objective import OBJECTIVES
from pipeline.policy import Policy
from pipeline.records import Rollouts
from tests.oracles import gradients_by_loop

POLICIES = ["llama", "qwen3", "qwen2", "adapted"]
ERROR = 2e-3  # of the largest score: what rounding leaves of a difference of log-probabilities of 4e-3


@pytest.fixture(params=POLICIES)
def policy(request):
    """An untied Llama, a tied Qwen3, a Qwen2 with biases, and a LoRA adapter, in turn."""
    return request.getfixturevalue(request.param)


def exact_dots(policy, rollouts, objective, direction):
    """The inner product of each prompt's gradient, by a backward pass of its own, with the direction."""
    grads = gradients_by_loop(policy, rollouts, objective)
    return np.array([sum(float((g[n].double() * direction[n]).sum()) for n in direction) for g in grads.values()])


def assert_close(ours, expected):
    assert np.abs(ours - expected).max() <= ERROR * np.abs(expected).max()


def test_scores_are_the_inner_products(policy, make_rollouts):
    """Each score is the exact inner product up to a thousandth, and the ranking is the exact one."""
    rollouts = make_rollouts(policy, prompts=12, temperature=0.7)
    direction = target_direction(policy, make_rollouts(policy, seed=1), "grpo_sequence", size=3)
    uids, scores = dot_scores(policy, rollouts, "grpo_sequence", direction)
    expected = exact_dots(policy, rollouts, "grpo_sequence", direction)
    assert uids == list(rollouts.groups())
    assert_close(scores, expected)
    assert spearmanr(scores, expected)[0] > 0.99


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_keeps_its_coefficients(llama, make_rollouts, objective):
    """The coefficients are those at theta itself, whatever the objective makes of the ratio to the sampler."""
    rollouts = make_rollouts(llama, prompts=6, drift=0.4)
    direction = target_direction(llama, make_rollouts(llama, seed=1), objective, size=3)
    assert_close(
        dot_scores(llama, rollouts, objective, direction)[1], exact_dots(llama, rollouts, objective, direction)
    )


def test_the_target_is_the_mean_of_the_gradients(policy, make_rollouts):
    """The target is the sum of the prompts' gradients over ``size``, whatever the passes; left-out prompts count."""
    rollouts = make_rollouts(policy)
    loop = gradients_by_loop(policy, rollouts, "grpo_sequence").values()
    for micro_tokens in (65_536, 30, 1):
        ours = target_direction(policy, rollouts, "grpo_sequence", size=5, micro_tokens=micro_tokens)
        for name, part in ours.items():
            mean = sum(grads[name] for grads in loop) / 5
            assert torch.allclose(part, mean, rtol=1e-3, atol=2e-5 * float(mean.abs().max()))
    assert ours.keys() == policy.trainable().keys()


def test_scores_along_their_own_sum_add_up_to_its_square(policy, make_rollouts):
    """With the sum of the gradients as the target, the scores add up to its squared length."""
    rollouts = make_rollouts(policy)
    total = target_direction(policy, rollouts, "grpo_sequence", size=3)
    square = sum(float(part.double().pow(2).sum()) for part in total.values())
    assert dot_scores(policy, rollouts, "grpo_sequence", total)[1].sum() / 3 == pytest.approx(square, rel=1e-3)


def test_a_table_of_logits_by_hand():
    """One row of equal logits: the score of two answers, rewards 1 and 0, is A/2 times the logits' difference in v.

    c = +-A/2 with A = .5 / (sqrt(.5) + 1e-4); grad log pi(x) = onehot(x) - 1/3; v is 2 on answer 1 and -1 on answer 2.
    """

    class Table(nn.Module):
        config, dtype = SimpleNamespace(), torch.float32

        def __init__(self):
            super().__init__()
            self.rows = nn.Embedding(3, 3)
            nn.init.ones_(self.rows.weight)

        def forward(self, input_ids, logits_to_keep, **_):
            return SimpleNamespace(logits=self.rows(input_ids)[:, -logits_to_keep:])

    policy = Policy(Table(), SimpleNamespace(pad_token_id=0))
    one = ("a", 0, "p", 0, (0,), (1,), (float(np.log(1 / 3)),), 1.0, "stop", 0, "", 1.0, "correct")
    two = ("a", 1, "p", 0, (0,), (2,), (float(np.log(1 / 3)),), 1.0, "stop", 0, "", 0.0, "incorrect")
    rollouts = Rollouts(*zip(one, two, strict=True))
    v = {"rows.weight": torch.tensor([[0.0, 2.0, -1.0], [7.0, 7.0, 7.0], [5.0, 0.0, 0.0]])}
    a = 0.5 / (np.sqrt(0.5) + 1e-4)
    assert dot_scores(policy, rollouts, "grpo", v)[1] == pytest.approx([a / 2 * 3], rel=1e-3)
    direction = target_direction(policy, rollouts, "grpo", size=2)["rows.weight"]
    assert direction.numpy() == pytest.approx(np.array([[0, a / 4, -a / 4], [0, 0, 0], [0, 0, 0]]), rel=1e-4, abs=1e-7)


@given(exponent=st.integers(-12, 12), batch_tokens=st.sampled_from([1, 30, 4096]), order=st.permutations(range(13)))
def test_length_of_the_target_batches_and_order_do_not_matter(_fixed, exponent, batch_tokens, order):
    """Scores scale with the target, and do not depend on which rollouts share a pass, or on their order."""
    policy, rollouts, direction, scores = _fixed
    scaled = {name: part * 10.0**exponent for name, part in direction.items()}
    uids, ours = dot_scores(policy, rollouts.take(order), "grpo_sequence", scaled, batch_tokens=batch_tokens)
    assert_close(ours / 10.0**exponent, np.array([scores[uid] for uid in uids]))


@pytest.fixture(scope="module")
def _fixed():
    from tests.conftest import _make_rollouts

    policy = untrained_policy(0)
    rollouts = _make_rollouts(policy)
    direction = target_direction(policy, rollouts, "grpo_sequence", size=3)
    return (
        policy,
        rollouts,
        direction,
        dict(zip(*dot_scores(policy, rollouts, "grpo_sequence", direction), strict=True)),
    )


def test_a_target_that_these_rollouts_do_not_feel_scores_zero(llama, make_rollouts):
    """A direction in the embedding of a token that is nowhere gives exactly zero."""
    rollouts = make_rollouts(llama)
    direction = {name: torch.zeros_like(p) for name, p in llama.trainable().items()}
    direction["model.embed_tokens.weight"][llama.tokenizer.eos_token_id] = 1.0
    there = {token for ids in (*rollouts.prompt_ids, *rollouts.completion_ids) for token in ids}
    assert llama.tokenizer.eos_token_id not in there
    assert not dot_scores(llama, rollouts, "grpo_sequence", direction)[1].any()


def test_prompts_that_agree_score_zero(llama, make_rollouts):
    """Where all rewards are equal the score is zero: such a prompt has no gradient."""
    direction = target_direction(llama, make_rollouts(llama, seed=1), "grpo_sequence", size=3)
    assert not dot_scores(llama, make_rollouts(llama, rewards=(1.0,)), "grpo_sequence", direction)[1].any()


def test_bfloat16_is_scored_in_a_float32_copy(llama, make_rollouts):
    """A policy in bfloat16 scores as its own weights do in float32, and stays as it is."""
    rollouts = make_rollouts(llama, prompts=8)
    llama.model.to(torch.bfloat16)
    before = {name: p.clone() for name, p in llama.model.named_parameters()}
    direction = target_direction(llama, make_rollouts(llama, seed=1), "grpo_sequence", size=3)
    _, rough = dot_scores(llama, rollouts, "grpo_sequence", direction)
    assert all(torch.equal(p, before[name]) and p.dtype == torch.bfloat16 for name, p in llama.model.named_parameters())
    llama.model.float()
    assert_close(rough, exact_dots(llama, rollouts, "grpo_sequence", direction))


@pytest.mark.parametrize("broken", [False, True])
def test_the_weights_are_put_back(policy, make_rollouts, monkeypatch, broken):
    """After scoring, and after an error in the middle of it, every weight has its own storage, bits and flag."""
    rollouts = make_rollouts(policy)
    direction = target_direction(policy, rollouts, "grpo_sequence", size=3)
    before = {name: (p.data_ptr(), p.detach().clone(), p.requires_grad) for name, p in policy.model.named_parameters()}
    if broken:
        monkeypatch.setattr("pipeline.directional.packed_logps", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dot_scores(policy, rollouts, "grpo_sequence", direction)
    else:
        dot_scores(policy, rollouts, "grpo_sequence", direction)
    for name, p in policy.model.named_parameters():
        pointer, value, trainable = before[name]
        assert (p.data_ptr(), p.requires_grad, p.grad) == (pointer, trainable, None)
        assert torch.equal(p, value)


def test_a_diverged_policy_is_refused_by_prompt(llama, make_rollouts):
    """NaN weights stop the scoring with the name of a prompt."""
    rollouts = make_rollouts(llama)
    direction = target_direction(llama, rollouts, "grpo_sequence", size=3)
    with torch.no_grad():
        llama.model.lm_head.weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="prompt-0"):
        dot_scores(llama, rollouts, "grpo_sequence", direction)


def test_targets_that_do_not_fit_are_refused(llama, make_rollouts):
    """A missing parameter, another shape, a value that is not finite and a zero target are named."""
    rollouts = make_rollouts(llama)
    fit = target_direction(llama, rollouts, "grpo_sequence", size=3)
    name = "model.norm.weight"
    for change, message in (
        ({k: p for k, p in fit.items() if k != name}, r"direction\['model.norm.weight'\] has shape None"),
        ({**fit, "odd": torch.ones(2)}, r"direction\['odd'\] has shape \(2,\)"),
        ({**fit, name: torch.ones(3)}, r"shape \(3,\), the policy's parameter \(128,\)"),
        ({**fit, name: torch.full((128,), float("inf"))}, "length inf"),
        ({k: torch.zeros_like(p) for k, p in fit.items()}, "length 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dot_scores(llama, rollouts, "grpo_sequence", change)
    with pytest.raises(ValueError, match="objective = 'ppo'"):
        dot_scores(llama, rollouts, "ppo", fit)


@pytest.mark.parametrize("size", [2, 0])
def test_a_set_smaller_than_its_prompts_is_refused(llama, make_rollouts, size):
    """The size of a validation set cannot be less than the prompts that are there."""
    with pytest.raises(ValueError, match=f"size = {size}: rollouts hold 3"):
        target_direction(llama, make_rollouts(llama), "grpo_sequence", size=size)


def test_no_rollouts_have_no_scores(llama, make_rollouts):
    """Without rollouts there is nothing to score, and the target is zero."""
    rollouts = make_rollouts(llama)
    direction = target_direction(llama, rollouts, "grpo_sequence", size=3)
    uids, scores = dot_scores(llama, rollouts.take([]), "grpo_sequence", direction)
    assert uids == [] and scores.shape == (0,)
    assert not any(part.any() for part in target_direction(llama, rollouts.take([]), "grpo_sequence", size=3).values())
