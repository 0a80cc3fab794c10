"""The cost formulas: by hand, against counted operations and real bytes, and in the directions that they must go."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from pipeline.costs import (
    CALLS,
    STEP_CALLS,
    Cost,
    Rate,
    Shape,
    budgets,
    checkpoint_bytes,
    engine_bytes,
    generation,
    gradients,
    shape_of,
    static_bytes,
    token_bytes,
    update,
)
from pipeline.recompute import recompute_blocks

FLOPS_ONLY = Rate(1.0, 1e30, 0.0, "one operation a second, and nothing else counts")
SMALL = Shape(1000, 1000, 900, 2, 8, 2, 4, 10, 4)


def wide(recompute=False, lora=False):
    """A Llama wide enough that its products are what counts, and rows of 64 tokens for it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])) if lora else model
    if recompute:
        recompute_blocks(model)
    return model


def test_generation_by_hand():
    """Two prompts of 3 tokens, 5 completions of 7: each prompt once, each token of a completion, at its own context."""
    cost = generation(SMALL, FLOPS_ONLY, prompts=2, prompt_tokens=3, rollouts=5, new_tokens=7, batch_tokens=100)
    asked = 6 * (2 * 900 + 4 * 2 * 8 * 1.5)
    said = 70 * (2 * 900 + 4 * 2 * 8 * (3 + 3.5))
    assert (cost.rollouts, cost.sampled, cost.computed) == (10, 70, 76)
    assert cost.seconds == pytest.approx(asked + said)
    assert cost.memory == 1000 * 4 + 10 * (10 * 2 * 2 * 4 * 4 + 8 * 4 * 10)


def test_sampling_reads_the_weights_once_a_step():
    """What a step costs whatever the batch: all weights read, and the small calls of every layer; in each batch anew."""
    slow = Rate(1e30, 1000.0, 0.5, "")
    options = {"prompt_tokens": 3, "rollouts": 5, "new_tokens": 7}
    one = generation(SMALL, slow, prompts=2, batch_tokens=100, **options)
    assert one.seconds == pytest.approx(7 * (4000 / 1000 + (2 * CALLS + STEP_CALLS) * 0.5))
    assert generation(SMALL, slow, prompts=4, batch_tokens=100, **options).seconds == pytest.approx(2 * one.seconds)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_operations_are_those_that_torch_counts(lora, recompute):
    """The operations of a backward pass over rows of 64 tokens are torch's own count, to 5 %."""
    model, tokens = wide(recompute, lora), torch.arange(256).remainder(128).view(4, 64)
    shape = shape_of(model, eager=True, recompute=recompute)
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False).logits.sum().backward()
    # rows that share no prompt: every token attends to a row of 64 in the products that are made, masked or not
    expected = gradients(
        shape, FLOPS_ONLY, prompts=4, prompt_tokens=64, rollouts=1, new_tokens=0, micro_tokens=10_000
    ).seconds
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_shape_is_that_of_the_model(qwen3, llama, adapted):
    """Parameters, tied ones once, those that train, and widths are counted from the model itself."""
    tied = shape_of(qwen3.model)
    assert tied.parameters == tied.multiplied == sum(p.numel() for p in qwen3.model.parameters())
    assert tied.kv_width == qwen3.model.model.layers[0].self_attn.k_proj.out_features
    untied = shape_of(llama.model)
    assert untied.parameters - untied.multiplied == llama.model.get_input_embeddings().weight.numel()
    assert (untied.layers, untied.hidden, untied.heads, untied.itemsize) == (2, 128, 4, 4)
    assert shape_of(adapted.model).trainable == sum(p.numel() for p in adapted.trainable().values())


def test_a_skeleton_and_the_model_have_one_shape(llama, tmp_path):
    """What is known without the weights is what is known with them."""
    from pipeline.policy import load_policy, save_policy
    from pipeline.pretrained import skeleton

    save_policy(llama, tmp_path)
    lora = {"rank": 2, "alpha": 4, "targets": "all-linear"}
    for options in ({}, {"lora": lora}, {"dtype": "bfloat16"}):
        assert shape_of(skeleton(tmp_path, **options)) == shape_of(load_policy(tmp_path, **options).model)


def test_a_cache_and_a_checkpoint_have_their_bytes(llama, tmp_path):
    """A token of the cache, and a checkpoint with its moments, take the bytes that they really take."""
    from pipeline.optimization import Optimization, make_optimizer, optimizer_state
    from pipeline.policy import save_policy

    shape = shape_of(llama.model)
    cache = llama.model(torch.tensor([[3, 4, 5]]), use_cache=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 3
    two, one = (
        generation(shape, FLOPS_ONLY, prompts=1, prompt_tokens=n, rollouts=1, new_tokens=0, batch_tokens=100).memory
        for n in (9, 8)
    )
    assert two - one == real
    options = Optimization(1, 1e-3, (0.9, 0.999), 0, 1.0, 1.0, 100)
    optimizer = make_optimizer(llama, options)
    llama.model(torch.tensor([[3, 4, 5]])).logits.sum().backward()
    optimizer.step()
    save_policy(llama, tmp_path)
    save_file(optimizer_state(llama, optimizer), tmp_path / "optimizer.safetensors")
    stored = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert checkpoint_bytes(shape) == pytest.approx(stored, rel=0.02)


def test_recomputation_trades_time_for_memory():
    """Computing blocks twice takes a third more operations and less memory, the more so the more layers there are."""
    deep = dataclasses.replace(SMALL, layers=48, hidden=64, vocabulary=1)
    twice = dataclasses.replace(deep, recompute=True)
    options = {"prompts": 3, "prompt_tokens": 5, "rollouts": 2, "new_tokens": 4, "micro_tokens": 1000}
    a, b = (gradients(shape, FLOPS_ONLY, **options) for shape in (deep, twice))
    assert b.seconds == pytest.approx(4 / 3 * a.seconds)
    assert token_bytes(twice, 10) < 0.1 * token_bytes(deep, 10)


@given(
    st.integers(1, 10**10), st.integers(1, 60), st.integers(1, 4000), st.integers(2, 2000), st.integers(1, 4000),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_what_fits_fits(parameters, layers, width, prompt, new, eager, recompute):
    """The budgets for some memory keep a batch of rollouts and a training step within it; too little is refused."""
    shape = Shape(parameters, parameters, parameters, layers, width, 4, width, 1000, 2, eager, recompute)
    memory = 24.0 * 2**30
    try:
        batch, micro = budgets(shape, memory, prompt_tokens=prompt, new_tokens=new)
    except ValueError as error:
        assert "policy.memory_gib = 24.0 is too little" in str(error)
        return
    common = {"prompts": 64, "prompt_tokens": prompt, "rollouts": 1, "new_tokens": new}
    beside = 3 * shape.trainable * shape.itemsize
    assert generation(shape, FLOPS_ONLY, **common, batch_tokens=batch).memory + beside <= memory
    step = update(shape, FLOPS_ONLY, **common, micro_tokens=micro)
    assert step.memory <= memory + 64 * (1 << 18)  # tables are counted for one prompt only
    assert static_bytes(shape) < memory


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 16))
def test_more_of_anything_costs_more(prompts, more, rollouts):
    """Cost grows with prompts, in every part that it has."""
    options = {"prompt_tokens": 5, "rollouts": rollouts, "new_tokens": 4}
    rate = Rate(1e6, 1e6, 1e-6, "")
    for made, budget in ((generation, "batch_tokens"), (gradients, "micro_tokens"), (update, "micro_tokens")):
        few, many = (made(SMALL, rate, prompts=n, **options, **{budget: 100}) for n in (prompts, prompts + more))
        assert few.computed < many.computed
        assert few.seconds < many.seconds
        assert few.disk <= many.disk
        assert few.memory <= many.memory


def test_costs_add_up():
    """Costs one after the other add, memory aside, of which the larger counts."""
    a, b = Cost(1, 2, 3, 4.0, 5.0, 6.0), Cost(10, 20, 30, 40.0, 3.0, 60.0)
    assert a + b == Cost(11, 22, 33, 44.0, 5.0, 66.0)
    assert a.times(3) == a + a + a


def test_a_policy_of_a_billion_by_hand():
    """1.5 B parameters in bfloat16: 6 M operations a token, 3 GB of weights, 9 GB a stored checkpoint, by hand."""
    shape = Shape(1_500_000_000, 1_500_000_000, 1_500_000_000, 28, 1536, 12, 256, 151_936, 2)
    cost = gradients(shape, FLOPS_ONLY, prompts=1, prompt_tokens=0, rollouts=1, new_tokens=1000, micro_tokens=10**6)
    assert cost.seconds == pytest.approx(1000 * 6 * 1.5e9, rel=0.03)
    assert static_bytes(shape) == 3e9
    assert checkpoint_bytes(shape) == 9e9


def test_an_engine_holds_merged_weights_and_a_cache():
    """Its bytes by hand: no adapter, a tied output layer once more, the weights shared and the cache not."""
    untied = Shape(1000, 1000, 900, 2, 8, 2, 4, 10, 4)
    assert engine_bytes(untied, 50.0, 1) == 1000 * 4 + 50
    tied = dataclasses.replace(untied, multiplied=1000)
    assert engine_bytes(tied, 50.0, 2) == (1000 + 10 * 8) * 4 / 2 + 50
    assert engine_bytes(dataclasses.replace(tied, trainable=100), 0.0, 1) == (900 + 10 * 8) * 4
