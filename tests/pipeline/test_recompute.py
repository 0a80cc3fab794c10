"""Blocks that are computed twice: the same gradients for every prompt, from less memory."""

import copy
import weakref

import pytest
import torch

from pipeline.capture import capture
from pipeline.features import projection_for, sketch_gradients
from pipeline.policy import Policy, load_policy, save_policy
from pipeline.recompute import current, recompute_blocks
from pipeline.scope import last_block
from pipeline.weighted import WAYS, plain
from tests.oracles import gradients_by_loop
from tests.pipeline.test_gradients import POLICIES, assert_equal, collect

ROUNDING = 1e-6  # the second run repeats the first bit for bit; only sums over prompts may be ordered otherwise


@pytest.fixture(params=POLICIES)
def pair(request) -> tuple[Policy, Policy]:
    """A policy, and its copy whose blocks are computed twice."""
    policy = request.getfixturevalue(request.param)
    twice = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    recompute_blocks(twice.model)
    return policy, twice


def runs_of_blocks(model) -> list[int]:
    """Count the calls of each block's first linear layer from now on."""
    counts = [0] * len(model.get_submodule("model.layers"))
    for i, block in enumerate(model.get_submodule("model.layers")):
        block.mlp.gate_proj.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    return counts


def test_each_prompt_has_the_gradient_of_its_own_backward_pass(pair, make_rollouts):
    """The gradient of each prompt, for every trainable parameter, is that of an ordinary pass of its own."""
    policy, twice = pair
    rollouts = make_rollouts(policy, temperature=0.7)
    assert_equal(collect(twice, rollouts), gradients_by_loop(policy, rollouts, "grpo_sequence"))
    assert_equal(collect(twice, rollouts), collect(policy, rollouts), ROUNDING)
    assert current() is None


def test_several_passes_a_prompt_add_up(pair, make_rollouts):
    """Groups that are cut into several passes give the same gradients too."""
    policy, twice = pair
    rollouts = make_rollouts(policy)
    assert_equal(collect(twice, rollouts, micro_tokens=1), collect(policy, rollouts, micro_tokens=1), ROUNDING)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_weighted_steps_are_the_same(llama, make_rollouts, way):
    """Each way of weighting a step gives the gradient that it gives without recomputation."""
    twice = Policy(copy.deepcopy(llama.model), llama.tokenizer)
    recompute_blocks(twice.model)
    found = []
    for policy in (llama, twice):
        scope = last_block(policy.model)[1] if way == "scope" else None
        projection = projection_for(policy, 64, kind="sparse" if way == "exact" else "factored", scope=scope)
        weigh = lambda rows: 1.0 + abs(rows[:, 0])  # noqa: E731
        WAYS[way](policy, make_rollouts(llama), "grpo_clipped", projection, weigh, micro_tokens=4096)
        found.append({name: p.grad for name, p in policy.trainable().items()})
    assert_equal({"step": found[1]}, {"step": found[0]}, ROUNDING)


def test_blocks_run_twice_where_a_gradient_is_taken_and_once_elsewhere(llama, make_rollouts):
    """A backward pass computes each block again; a pass without gradients does not."""
    rollouts = make_rollouts(llama)
    recompute_blocks(llama.model)
    counts = runs_of_blocks(llama.model)
    plain(llama, rollouts, "grpo_clipped", micro_tokens=4096)
    assert counts == [2, 2]
    with torch.no_grad():
        llama.model(torch.tensor([[3, 4]]))
    assert counts == [3, 3]


def test_inputs_are_not_held_from_the_first_run_on(llama, make_rollouts):
    """After the forward pass, what the graph keeps of a block is its input, not the inputs of its layers."""

    def held(model) -> bool:
        """Whether the input of a block's last layer is alive once the forward pass is over."""
        seen: list[weakref.ref[torch.Tensor]] = []
        layer = model.get_submodule("model.layers.0.mlp.down_proj")
        hook = layer.register_forward_hook(lambda _, inputs, __: seen.append(weakref.ref(inputs[0].untyped_storage())))
        with capture(model, 2, lambda _: None):
            out = model(torch.tensor([[3, 4, 5], [5, 6, 7]]), use_cache=False).logits.sum()
            hook.remove()
            found = seen[0]() is not None
            out.backward()
        return found

    assert held(llama.model)
    recompute_blocks(llama.model)
    assert not held(llama.model)


def test_a_loaded_policy_recomputes_where_it_is_asked_to(llama, tmp_path, make_rollouts):
    """The switch of ``load_policy`` changes no sketch, and what is saved is an ordinary checkpoint."""
    save_policy(llama, tmp_path)
    rollouts = make_rollouts(llama)
    sketches = []
    for checkpointing in (False, True):
        policy = load_policy(tmp_path, checkpointing=checkpointing)
        sketches.append(sketch_gradients(policy, rollouts, "grpo", projection_for(policy, 256))[1])
    assert sketches[1] == pytest.approx(sketches[0], rel=1e-5, abs=1e-6)
    save_policy(policy, tmp_path / "again")
    again = load_policy(tmp_path / "again")
    assert all(torch.equal(p, again.trainable()[name]) for name, p in llama.trainable().items())


def test_the_librarys_own_switch_does_nothing_in_evaluation_mode(llama, make_rollouts):
    """What this file is for: under the library's switch a policy, held in evaluation mode, computes no block twice."""
    rollouts = make_rollouts(llama)
    llama.model.eval().gradient_checkpointing_enable()
    counts = runs_of_blocks(llama.model)
    plain(llama, rollouts, "grpo_clipped", micro_tokens=4096)
    assert counts == [1, 1]


def test_a_cache_is_filled_once(llama):
    """A pass that fills a cache under autograd is not computed twice: its keys would be there twice."""
    tokens = torch.tensor([[3, 4, 5]])
    expected = llama.model(tokens, use_cache=True).logits
    recompute_blocks(llama.model)
    found = llama.model(tokens, use_cache=True)
    found.logits.sum().backward()
    assert torch.equal(found.logits, expected)
    assert found.past_key_values.get_seq_length() == 3


def test_a_model_without_blocks_is_refused():
    """A model without a list of blocks cannot be computed block by block, and says so."""
    with pytest.raises(ValueError, match=r"policy\.checkpointing = true, but Linear has no list of blocks"):
        recompute_blocks(torch.nn.Linear(2, 2))
