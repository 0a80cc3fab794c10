"""One gradient a prompt out of one backward pass, against one backward pass a prompt."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.capture import capture
from pipeline.features import projection_for, sketch_gradients
from pipeline.gradients import prompt_gradients
from pipeline.objective import OBJECTIVES
from pipeline.records import Rollouts
from tests.oracles import gradients_by_loop

POLICIES = ["llama", "qwen3", "qwen2", "adapted"]
ROUNDING = 2e-5  # of the largest entry of a prompt's gradient, in float32


@pytest.fixture(params=POLICIES)
def policy(request):
    """An untied Llama, a tied Qwen3 with normed queries, a Qwen2 with biases, and a LoRA adapter, in turn."""
    return request.getfixturevalue(request.param)


def collect(policy, rollouts, objective="grpo_sequence", **options):
    """Sum what the sink is given, and return it by prompt and by parameter."""
    total = {uid: {name: torch.zeros(p.shape) for name, p in policy.trainable().items()} for uid in rollouts.groups()}

    def sink(name, prompts, grads, rows=None):
        for uid, grad in zip(list(total)[prompts], grads, strict=True):
            total[uid][name][slice(None) if rows is None else rows] += grad

    assert prompt_gradients(policy, rollouts, objective, sink, **options) == list(total)
    return total


def assert_equal(ours, expected, rounding=ROUNDING):
    assert ours.keys() == expected.keys()
    for uid, grads in expected.items():
        assert ours[uid].keys() == grads.keys()
        largest = max(float(g.abs().max()) for g in grads.values())
        assert largest > 0
        for name, grad in grads.items():
            assert float((ours[uid][name] - grad).abs().max()) <= rounding * largest, (uid, name)


def test_each_prompt_has_the_gradient_of_its_own_backward_pass(policy, make_rollouts):
    """The gradient of each prompt, for every trainable parameter, is the one that a pass of its own gives."""
    rollouts = make_rollouts(policy, temperature=0.7)
    assert_equal(collect(policy, rollouts), gradients_by_loop(policy, rollouts, "grpo_sequence"))


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_is_differentiated(llama, make_rollouts, objective):
    """Whatever the objective, the gradient is that of its loss."""
    rollouts = make_rollouts(llama, drift=0.4)
    assert_equal(collect(llama, rollouts, objective), gradients_by_loop(llama, rollouts, objective))


def test_prompt_gradients_add_up_to_the_batch_gradient(policy, make_rollouts):
    """The sum over prompts is what autograd makes of the whole batch at once."""
    rollouts = make_rollouts(policy)
    ours = collect(policy, rollouts)
    loop = gradients_by_loop(policy, rollouts, "grpo_sequence")
    batch = {name: sum(grads[name] for grads in loop.values()) for name in policy.trainable()}
    assert_equal({"batch": {n: sum(g[n] for g in ours.values()) for n in batch}}, {"batch": batch})


def test_batch_mates_order_and_padding_do_not_matter(policy, make_rollouts):
    """A prompt's gradient is the same alone, among others, and in any order of rows, to float32 rounding."""
    rollouts = make_rollouts(policy)
    whole = collect(policy, rollouts)
    for uid, rows in rollouts.groups().items():
        assert_equal(collect(policy, rollouts.take(rows)), {uid: whole[uid]})
    shuffled = rollouts.take(np.random.default_rng(0).permutation(len(rollouts)))
    assert_equal(collect(policy, shuffled), {uid: whole[uid] for uid in shuffled.groups()})


@pytest.mark.parametrize("objective", ["grpo_sequence", "grpo_clipped"])
@pytest.mark.parametrize(("micro_tokens", "row_tokens"), [(1, 1), (30, 16), (60, 1), (40, 1024)])
def test_small_passes_give_the_same_gradients(qwen3, make_rollouts, micro_tokens, row_tokens, objective, monkeypatch):
    """Passes that hold less than a group, or some groups, add up to the single pass, however rows are packed."""
    rollouts = make_rollouts(qwen3, drift=0.4)
    whole = collect(qwen3, rollouts, objective)
    monkeypatch.setattr("pipeline.packing.ROW_TOKENS", row_tokens)
    assert_equal(collect(qwen3, rollouts, objective, micro_tokens=micro_tokens), whole)


def test_sketches_are_projected_gradients(policy, make_rollouts):
    """The streamed sketch is the projection of the flat gradient, and small passes change nothing beyond rounding."""
    rollouts = make_rollouts(policy)
    projection = projection_for(policy, 64, seed=1)
    uids, sketch = sketch_gradients(policy, rollouts, "grpo_sequence", projection)
    loop = gradients_by_loop(policy, rollouts, "grpo_sequence")
    flat = torch.stack([torch.cat([loop[uid][name].flatten() for name in projection.layout]) for uid in uids])
    scale = np.abs(sketch).max()
    assert sketch / scale == pytest.approx(projection(flat).numpy() / scale, abs=1e-4)
    for micro_tokens in (30, 60):
        assert sketch_gradients(policy, rollouts, "grpo_sequence", projection, micro_tokens=micro_tokens)[
            1
        ] / scale == pytest.approx(sketch / scale, abs=1e-4)


def test_prompts_that_agree_have_no_gradient(llama, make_rollouts):
    """Where all rewards are equal, every gradient is exactly zero."""
    grads = collect(llama, make_rollouts(llama, rewards=(1.0,)))
    assert all(not g.any() for of_prompt in grads.values() for g in of_prompt.values())


@pytest.mark.parametrize("name", ["llama", "qwen3", "adapted"])
def test_bfloat16_gradients_point_the_same_way(request, make_rollouts, name):
    """A policy in bfloat16 gives finite float32 sketches with a cosine above 0.9 to those in float32."""
    policy = request.getfixturevalue(name)
    rollouts = make_rollouts(policy)
    projection = projection_for(policy, 256)
    _, exact = sketch_gradients(policy, rollouts, "grpo_sequence", projection)
    policy.model.to(torch.bfloat16)
    _, rough = sketch_gradients(policy, rollouts, "grpo_sequence", projection)
    assert rough.dtype == np.float32
    assert np.isfinite(rough).all()
    cosines = (exact * rough).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(rough, axis=1)
    assert cosines.min() > 0.9


def test_a_diverged_policy_is_refused_by_prompt(llama, make_rollouts):
    """NaN weights stop the run with the name of a prompt, and leave the parameters trainable."""
    rollouts = make_rollouts(llama)
    before = list(llama.trainable())
    with torch.no_grad():
        llama.model.lm_head.weight[3] = float("nan")
    for function, last in (
        (prompt_gradients, lambda *part, **rows: None),
        (sketch_gradients, projection_for(llama, 8)),
    ):
        with pytest.raises(FloatingPointError, match="prompt-0"):
            function(llama, rollouts, "grpo_sequence", last)
    assert list(llama.trainable()) == before


def test_a_rollout_that_is_not_finite_is_refused_by_prompt(llama, make_rollouts):
    """A recorded log-probability that is NaN stops the run with the name of its prompt."""
    rollouts = make_rollouts(llama)
    row = rollouts.groups()["prompt-1"][0]
    logps = [x if i != row else (float("nan"),) * len(x) for i, x in enumerate(rollouts.logp_old)]
    broken = Rollouts.of({**rollouts.columns(), "logp_old": logps})
    with pytest.raises(FloatingPointError, match="prompt-1"):
        sketch_gradients(llama, broken, "grpo_sequence", projection_for(llama, 8))


def test_a_layer_whose_rows_are_not_rollouts_is_refused():
    """A layer that sees its rows in another shape cannot be told apart by prompt, and says so."""

    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x.reshape(-1, 3))

    model = Flattening()
    with pytest.raises(ValueError, match=r"Linear.*linear\.bias.*8 rows for 4"), capture(model, 4, print):
        model(torch.ones(4, 2, 3))
    assert all(p.requires_grad for p in model.parameters())
    assert not model.linear._forward_hooks


def test_frozen_parameters_stay_frozen(llama, make_rollouts):
    """Only trainable parameters are reported; afterwards each is as trainable as before, without a gradient left."""
    llama.model.model.embed_tokens.weight.requires_grad_(False)
    llama.model.model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in llama.model.named_parameters()}
    rollouts = make_rollouts(llama)
    grads = collect(llama, rollouts)
    assert_equal(grads, gradients_by_loop(llama, rollouts, "grpo_sequence"))
    assert set(grads["prompt-0"]) == {name for name, trainable in before.items() if trainable}
    assert {name: p.requires_grad for name, p in llama.model.named_parameters()} == before
    assert all(p.grad is None for p in llama.model.parameters())


def test_an_unknown_objective_or_mixed_temperatures_are_refused(llama, make_rollouts):
    """An objective outside the table, and rollouts of two temperatures, are refused by name."""
    with pytest.raises(ValueError, match="objective = 'ppo'"):
        collect(llama, make_rollouts(llama), "ppo")
    mixed = Rollouts.concat([make_rollouts(llama), make_rollouts(llama, temperature=0.5)])
    with pytest.raises(ValueError, match=r"\[0\.5, 1\.0\]"):
        collect(llama, mixed)
