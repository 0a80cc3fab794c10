"""Projected gradients: metrics, named layers, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.features import adam_metric, project, projection_for, sketch_gradients
from pipeline.optimization import Optimization, make_optimizer, optimizer_state
from pipeline.scope import named, parameters_of
from tests.oracles import gradients_by_loop

SETTINGS = Optimization(
    total_steps=4, lr=1e-3, betas=(0.9, 0.98), warmup=1, final=0.1, clip_norm=1.0, micro_tokens=1024
)


def flat(grads, names):
    return torch.cat([grads[name].flatten() for name in names]).double().numpy()


def test_adams_metric_is_between_the_two_gradients(llama, make_rollouts):
    """Over 60 projections, the mean inner product is g_p M g_q with M from Adam's own state, to four standard errors."""
    rollouts = make_rollouts(llama)
    optimizer = make_optimizer(llama, SETTINGS)
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in llama.trainable().values():
            p.grad = torch.randn(p.shape, generator=rng)
        optimizer.step()
    llama.model.zero_grad(set_to_none=True)
    metric = adam_metric(llama, optimizer_state(llama, optimizer), beta=0.98)
    by_hand = {
        name: 1 / (np.sqrt(optimizer.state[p]["exp_avg_sq"].numpy() / (1 - 0.98**3)) + 1e-8)
        for name, p in llama.trainable().items()
    }
    loop = gradients_by_loop(llama, rollouts, "rft")
    one, other = list(loop)[:2]
    true = sum((loop[one][n].numpy() * by_hand[n] * loop[other][n].numpy()).sum() for n in by_hand)
    seen = []
    for seed in range(60):
        _, rows = sketch_gradients(llama, rollouts, "rft", projection_for(llama, 512, seed=seed), metric=metric)
        seen.append(float(rows[0] @ rows[1]))
    assert abs(np.mean(seen) - true) < 4 * np.std(seen, ddof=1) / np.sqrt(len(seen))


def test_a_metric_needs_the_state_and_a_sparse_projection(llama, make_rollouts):
    """A parameter without moments is named, and a factored projection is refused."""
    with pytest.raises(ValueError, match=r"lacks 'model\.embed_tokens\.weight'"):
        adam_metric(llama, {}, beta=0.98)
    ones = {name: torch.ones(p.shape) for name, p in llama.trainable().items()}
    with pytest.raises(ValueError, match="use the sparse one"):
        projection = projection_for(llama, 16, kind="factored")
        sketch_gradients(llama, make_rollouts(llama), "rft", projection, metric=ones)


@pytest.mark.parametrize("kind", ["sparse", "factored"])
def test_named_layers_alone_are_projected(llama, make_rollouts, kind):
    """With a scope, the sketch is that of the named parameters' gradients, and the others stay trainable."""
    rollouts = make_rollouts(llama)
    scope = named(llama.model, ["*.q_proj.*", "lm_head.weight"])
    names = list(parameters_of(scope))
    assert sorted(names) == sorted(n for n in llama.trainable() if "q_proj" in n or n == "lm_head.weight")
    before = list(llama.trainable())
    projection = projection_for(llama, 400, kind=kind, scope=scope)
    uids, rows = sketch_gradients(llama, rollouts, "rft", projection, scope=scope)
    assert list(llama.trainable()) == before
    loop = gradients_by_loop(llama, rollouts, "rft")
    exact = np.array([flat(loop[uid], projection.layout) for uid in uids])
    if kind == "sparse":
        expected = projection(torch.from_numpy(exact).float()).numpy()
        assert rows / np.abs(rows).max() == pytest.approx(expected / np.abs(rows).max(), abs=1e-4)
    else:
        ratio = np.linalg.norm(rows, axis=1) / np.linalg.norm(exact, axis=1)
        assert ratio == pytest.approx(1, abs=0.35)


def test_a_pattern_that_names_nothing_is_refused(llama):
    """The message has the pattern and some names that there are; a model without anything trainable says so."""
    with pytest.raises(ValueError, match=r"'\*\.query' matches no trainable parameter; there are lm_head\.weight"):
        named(llama.model, ["*.query"])
    llama.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        named(llama.model, ["*"])


def test_an_unknown_kind_and_a_sketch_larger_than_the_gradient_are_refused(llama):
    """Both are refused with what would do."""
    with pytest.raises(ValueError, match="sparse, or factored"):
        projection_for(llama, 8, kind="gaussian")
    with pytest.raises(ValueError, match=r"dim_out = 1000000 exceeds the gradient's \d+ coordinates"):
        projection_for(llama, 10**6)


class Scaled(nn.Module):
    """A layer that no rule knows: it scales by a matrix's diagonal."""

    def __init__(self, dim):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(dim) + 0.1)

    def forward(self, x):
        return x * self.matrix.diagonal() + x.mean() * 0


@pytest.mark.parametrize("kind", ["sparse", "factored"])
def test_a_layer_without_a_rule_falls_back_and_says_so(llama, make_rollouts, kind):
    """Its gradients are exact all the same, and a warning names the layer."""
    llama.model.model.norm = Scaled(llama.model.config.hidden_size)
    rollouts = make_rollouts(llama)
    scope = named(llama.model, ["model.norm.matrix"])
    projection = projection_for(llama, 16, kind=kind, scope=scope)
    with pytest.warns(UserWarning, match="Scaled has no closed form"):
        uids, rows = sketch_gradients(llama, rollouts, "rft", projection, scope=scope)
    loop = gradients_by_loop(llama, rollouts, "rft")
    exact = torch.stack([loop[uid]["model.norm.matrix"].flatten() for uid in uids])
    expected = projection(exact) if kind == "sparse" else projection.vector("model.norm.matrix", exact).flatten(1)
    assert rows / np.abs(rows).max() == pytest.approx(expected.numpy() / np.abs(rows).max(), abs=1e-4)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["sparse", "factored"])
def test_a_gradient_that_is_not_finite_names_prompt_and_parameter(llama, make_rollouts, bad, kind):
    """Where log-probabilities are finite but a gradient overflows, the message has the prompt, parameter and dtype."""
    layer = llama.model.model.layers[0].mlp.down_proj

    def overflow(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda b: torch.cat([b[:1] * bad, b[1:]]))
        return output

    layer.register_forward_hook(overflow)
    rollouts = make_rollouts(llama)
    with pytest.raises(FloatingPointError, match=r"prompt-0: .*layers\.0\.mlp\.down_proj\.weight.*float32"):
        sketch_gradients(llama, rollouts, "rft", projection_for(llama, 16, kind=kind))


@pytest.mark.parametrize("kind", ["sparse", "factored"])
@pytest.mark.parametrize("fixture", ["llama", "qwen3", "qwen2", "adapted"])
def test_a_whole_gradient_is_projected_as_it_would_be_in_a_pass(request, fixture, make_rollouts, kind):
    """Projecting each prompt's gradient from the loop gives the sketch of the pass, for every layer and tied matrix."""
    policy = request.getfixturevalue(fixture)
    rollouts = make_rollouts(policy)
    projection = projection_for(policy, 100, kind=kind)
    uids, rows = sketch_gradients(policy, rollouts, "rft", projection)
    loop = gradients_by_loop(policy, rollouts, "rft")
    for uid, row in zip(uids, rows, strict=True):
        assert project(projection, loop[uid]) == pytest.approx(row, abs=1e-4 * float(np.abs(row).max()))
