"""The three ways to a weighted gradient, against one backward pass a prompt."""

import numpy as np
import pytest
import torch

from pipeline.features import projection_for, sketch_gradients
from pipeline.scope import last_block
from pipeline.weighted import WAYS, choose, plain
from tests.oracles import gradients_by_loop

POLICIES = ["llama", "qwen3", "qwen2", "adapted"]


def space(policy, way):
    """The projection that a way reads."""
    if way == "exact":
        return projection_for(policy, 64)
    return projection_for(policy, 64, kind="factored", scope=last_block(policy.model)[1] if way == "scope" else None)


def taken(policy):
    """The gradients that were left on the parameters, which are then cleared."""
    grads = {name: p.grad.clone() for name, p in policy.trainable().items()}
    policy.model.zero_grad(set_to_none=True)
    return grads


def assert_weighted(policy, rollouts, weights, grads):
    loop = gradients_by_loop(policy, rollouts, "grpo_sequence")
    expected = {n: sum(w * loop[u][n] for u, w in zip(loop, weights, strict=True)) for n in grads}
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, grad in grads.items():
        assert float((grad - expected[name]).abs().max()) <= 3e-5 * largest, name


@pytest.mark.parametrize("micro_tokens", [65_536, 40])
@pytest.mark.parametrize("way", [*WAYS, "plain"])
@pytest.mark.parametrize("fixture", POLICIES)
def test_every_way_leaves_the_weighted_gradient(request, fixture, way, micro_tokens, make_rollouts):
    """Whatever the weights, the gradient left on every parameter is sum_p W_p g_p, g_p by a pass of its own."""
    policy = request.getfixturevalue(fixture)
    rollouts = make_rollouts(policy, drift=0.2)
    weights = np.random.default_rng(0).uniform(0, 3, len(rollouts.groups()))
    trainable = list(policy.trainable())
    if way == "plain":
        plain(policy, rollouts, "grpo_sequence", micro_tokens=micro_tokens, weights=weights)
    else:
        WAYS[way](policy, rollouts, "grpo_sequence", space(policy, way), lambda z: weights, micro_tokens=micro_tokens)
    assert_weighted(policy, rollouts, weights, taken(policy))
    assert list(policy.trainable()) == trainable


@pytest.mark.parametrize("micro_tokens", [65_536, 40])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("fixture", POLICIES)
def test_features_are_those_of_a_pass_for_features(request, fixture, way, micro_tokens, make_rollouts):
    """What a way shows to the weights is the sketch that a pass for features makes in the same space."""
    policy = request.getfixturevalue(fixture)
    rollouts = make_rollouts(policy)
    projection, seen = space(policy, way), []

    def weigh(features):
        seen.append(features)
        return np.ones(len(features))

    WAYS[way](policy, rollouts, "grpo_sequence", projection, weigh, micro_tokens=micro_tokens)
    scope = last_block(policy.model)[1] if way == "scope" else None
    _, expected = sketch_gradients(policy, rollouts, "grpo_sequence", projection, scope=scope)
    assert len(seen) == 1
    assert seen[0] / np.abs(expected).max() == pytest.approx(expected / np.abs(expected).max(), abs=1e-4)


def test_the_scope_sees_the_last_block_and_the_head_alone(llama, make_rollouts):
    """Its features are inner products of exactly those parameters' gradients: an exact sketch of them says the same."""
    block, scope = last_block(llama.model)
    names = {name for held in scope.values() for name in held.values()}
    last = [n for n in llama.trainable() if ".layers.1." in n]
    assert block is llama.model.model.layers[-1]
    assert names == {*last, "model.norm.weight", "lm_head.weight"}
    rollouts = make_rollouts(llama)
    loop = gradients_by_loop(llama, rollouts, "grpo_sequence")
    part = torch.stack([torch.cat([g[n].flatten() for n in sorted(names)]) for g in loop.values()]).numpy()
    gram = part @ part.T
    seen = []
    for seed in range(40):
        projection = projection_for(llama, 400, kind="factored", seed=seed, scope=scope)
        rows = sketch_gradients(llama, rollouts, "grpo_sequence", projection, scope=scope)[1]
        seen.append(rows @ rows.T)
    error = np.std(seen, axis=0, ddof=1) / np.sqrt(len(seen))
    assert (np.abs(np.mean(seen, axis=0) - gram) < 5 * error).all()


def test_the_exact_way_needs_gradients(llama, make_rollouts):
    """A factored projection never sees a gradient, and the exact way says so."""
    with pytest.raises(ValueError, match="use a sparse one"):
        WAYS["exact"](llama, make_rollouts(llama), "rft", space(llama, "scope"), lambda z: z[:, 0], micro_tokens=99)


def test_the_way_follows_the_size_of_the_problem(llama, monkeypatch):
    """Small problems keep gradients, larger ones factors, the largest the last block alone; each says why."""
    assert choose(llama, 16, 1000)[0] == "exact"
    way, why = choose(llama, 10**7, 1000)
    assert way == "bookkeeping"
    assert "MiB" in why
    assert choose(llama, 10**7, 10**8)[0] == "scope"
