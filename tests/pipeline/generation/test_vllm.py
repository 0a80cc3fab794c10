"""vLLM for real: agreement with our own pass in float32 and bfloat16, new weights at once, a bounded number in flight."""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from pipeline.embedded.warm_start import character_tokenizer
from pipeline.generation import Group, Request, Sampling
from pipeline.generation.agreement import TOLERANCE, Checked, differences
from pipeline.generation.transformers import TransformersGenerate
from pipeline.policy import Policy, collate, token_logps
from tests.pipeline.generation.conftest import CACHE

REQUESTS = [Request(f"prompt-{i}", tuple(range(2, 3 + i)), 4, 5) for i in range(4)]
TEN = Sampling(temperature=0.8, max_new_tokens=10)
SAME, OTHER = 1e-4, 1e-2  # nats a token: rounding in float32; weights that were moved by a tenth


@pytest.fixture
def engine(vllm_engine, sampled: Policy) -> Iterator[object]:
    """The engine, with the weights of ``sampled`` before and after."""
    vllm_engine.load(sampled)
    yield vllm_engine
    vllm_engine.load(sampled)


@pytest.fixture
def moved() -> Callable[[Policy, int], Policy]:
    """Makes a copy of a policy whose every weight is moved by about a tenth of its spread."""

    def move(policy: Policy, seed: int) -> Policy:
        other, generator = copy.deepcopy(policy), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in other.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter) * 0.1 * (parameter.std() if parameter.numel() > 1 else 1.0))
        return other

    return move


def sample(engine: object, requests: list[Request] = REQUESTS) -> list[Group]:
    return list(engine(requests, TEN))


def distance(groups: list[Group], policy: Policy) -> float:
    """Mean absolute difference [nats a token] of the recorded log-probabilities from those of our own pass."""
    found = []
    for group in groups:
        batch = collate([group.request.prompt_ids] * 4, group.completion_ids, policy.pad_id)
        with torch.no_grad():
            expected = token_logps(policy.model, batch, temperature=TEN.temperature).float().numpy()
        found += [np.abs(x - row[: len(x)]) for x, row in zip(group.logp, expected, strict=True)]
    return float(np.concatenate(found).mean())


@pytest.fixture
def tied() -> Policy:
    """A Qwen3 whose output layer shares its weights with the embeddings, with heads as wide as the CPU kernels take."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    return Policy(Qwen3ForCausalLM(Qwen3Config(**small(), tie_word_embeddings=True)).eval(), character_tokenizer())


@pytest.fixture
def biased() -> Policy:
    """A Qwen2, whose queries, keys and values have biases; not tied."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(2)
    return Policy(Qwen2ForCausalLM(Qwen2Config(**small(), tie_word_embeddings=False)).eval(), character_tokenizer())


def small() -> dict[str, object]:
    sizes = {"vocab_size": 27, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return sizes | heads | {"initializer_range": 0.3, "eos_token_id": 1, "pad_token_id": 0}


@pytest.mark.parametrize("name", ["llama", "tied", "biased", "adapted"])
def test_new_weights_are_sampled_from_at_once(engine, request, moved, name):
    """a, b, a, b: each time the samples are of the weights loaded last, tied, untied, biased or adapted, and no others."""
    a = request.getfixturevalue(name)
    b = moved(a, 1)
    for here, there in ((a, b), (b, a), (a, b), (b, a)):
        engine.load(here)
        groups = sample(engine)
        assert distance(groups, here) < SAME
        assert distance(groups, there) > OTHER
        assert differences(here, groups[0], TEN).mean() < SAME


def test_new_weights_start_no_new_engine(engine, sampled, moved):
    """Weights of the same shape are taken over in place; those of another architecture by one new start."""
    starts = engine.starts
    for seed in range(3):
        engine.load(moved(sampled, seed))
    assert engine.starts == starts
    wider = copy.deepcopy(sampled)
    wider.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e3}
    engine.load(wider)
    assert engine.starts == starts + 1


def test_a_prefix_cache_of_old_weights_is_an_error(engine, sampled, monkeypatch):
    """Where vLLM does not drop the keys and values of the old weights, loading new ones fails."""
    with monkeypatch.context() as patch:
        patch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(RuntimeError, match="cached of the old weights"):
            engine.load(sampled)


def test_handing_weights_over_leaves_the_policy_as_it_is(engine, adapted):
    """Merging an adapter for the engine changes no bit of the policy, whose base is still shared by later adapters."""
    before = {name: tensor.clone() for name, tensor in adapted.model.state_dict().items()}
    engine.load(adapted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.model.state_dict().items())


def test_stale_weights_are_noticed(engine, sampled, moved):
    """An engine whose weights are not the policy's is refused before its first group is handed over, and named."""
    engine.load(moved(sampled, 1))
    with pytest.raises(ValueError, match=r"this engine does not sample from this policy.*off by"):
        next(Checked(engine, sampled, "this engine")(REQUESTS, TEN))
    engine.load(sampled)
    assert len(list(Checked(engine, sampled, "this engine")(REQUESTS, TEN))) == len(REQUESTS)


def test_bfloat16_agrees_to_what_its_rounding_explains(engine, sampled):
    """In bfloat16 vLLM, Transformers' generation and our teacher-forced pass differ by 0.05 nats a token on average at most."""
    from pipeline.generation.vllm import VllmGenerate

    engine.close()  # one engine a process at a time
    half = Policy(copy.deepcopy(sampled.model).to(torch.bfloat16), sampled.tokenizer)
    other = VllmGenerate(dtype="bfloat16", cache=CACHE, sequences=64)
    other.load(half)
    for groups in (sample(other), sample(TransformersGenerate(half))):
        assert distance(groups, half) < TOLERANCE["bfloat16"]
    other.close()


def test_what_is_in_flight_is_bounded(engine, monkeypatch):
    """At most four times ``sequences`` completions are asked for, though a thousand are wanted; a larger group goes alone."""
    monkeypatch.setattr(engine, "sequences", 8)
    core, most = engine._llm.llm_engine, []
    step = core.step
    monkeypatch.setattr(core, "step", lambda: (most.append(core.get_num_unfinished_requests()), step())[1])
    groups = sample(engine, [Request(f"p{i}", (2, 3), 4, i) for i in range(250)])
    assert len(groups) == 250 and 8 <= max(most) <= 32
    assert len(sample(engine, [Request("many", (2, 3), 4, 0)] * 2 + [Request("more", (2, 3), 40, 0)])) == 3


def test_groups_come_while_others_are_in_flight(engine, sampled):
    """A short group is handed over before a long one that was asked for first has ended."""
    end = sampled.tokenizer.eos_token_id
    with torch.no_grad():
        model = copy.deepcopy(sampled.model)
        model.lm_head.weight[end].copy_(model.lm_head.weight[3])  # completions of very different length
    engine.load(Policy(model, sampled.tokenizer))
    requests = [Request(f"p{i}", (2, 3, 4 + i % 20), 1, i) for i in range(60)]
    order = [g.request.prompt_uid for g in engine(requests, Sampling(max_new_tokens=20))]
    assert sorted(order) == sorted(r.prompt_uid for r in requests) and order != [r.prompt_uid for r in requests]


def test_the_rest_of_the_process_is_left_alone(engine):
    """Threads can still be set after an engine was started, which its CPU worker would prevent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_weights_that_are_not_finite_are_reported(engine, sampled):
    """A policy with NaN in it ends in an error that names the prompt, as with Transformers."""
    broken = copy.deepcopy(sampled)
    with torch.no_grad():
        broken.model.lm_head.weight[3:].fill_(float("nan"))
    engine.load(broken)
    with pytest.raises(FloatingPointError, match=r"prompt-[0-3].*not finite"):
        sample(engine)


def test_an_engine_without_weights_says_so():
    """Sampling before ``load`` is refused."""
    from pipeline.generation.vllm import VllmGenerate

    with pytest.raises(ValueError, match="no weights yet"):
        next(VllmGenerate()(REQUESTS, TEN))
