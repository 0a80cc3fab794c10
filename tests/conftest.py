"""Offline, one thread, shapes checked; small random policies, and rollouts for them."""

# ruff: noqa: E402  the environment and the shape checks must be set before the code under test is imported

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

ROOT = Path(__file__).parents[1]
SHAPED = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in (ROOT / "pipeline").rglob("*.py")
    if "from jaxtyping import" in file.read_text()
)
install_import_hook(SHAPED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import settings

from pipeline.embedded.warm_start import character_tokenizer, untrained_policy
from pipeline.policy import Policy, collate, token_logps
from pipeline.records import Prompts, Rollouts, canonical, prompt_uid
from tests.servers import bucket, postgres, prefect  # noqa: F401  fixtures

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--torture N``: N times the rounds of tests that kill, damage and interrupt."""
    parser.addoption("--torture", type=int, default=1, metavar="N", help="N times the rounds of the stores' trials")


def pytest_configure(config: pytest.Config) -> None:
    """With pytest-xdist, say which tests go together."""
    if config.pluginmanager.hasplugin("xdist"):
        from tests.workers import ByFile

        config.pluginmanager.register(ByFile())


@pytest.fixture(scope="session")
def torture(request: pytest.FixtureRequest) -> int:
    """By how much the rounds of a trial are multiplied."""
    return request.config.getoption("--torture")


@pytest.fixture
def llama() -> Policy:
    """The embedded policy before its warm start, its output layer scaled up so that some tokens are likelier."""
    policy = untrained_policy(0)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(5)
    return policy


@pytest.fixture
def qwen3() -> Policy:
    """A two-layer Qwen3: normed queries and keys, shared key heads, tied embeddings."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    return Policy(
        Qwen3ForCausalLM(Qwen3Config(**_small(), head_dim=8, tie_word_embeddings=True)).eval(), character_tokenizer()
    )


@pytest.fixture
def qwen2() -> Policy:
    """A two-layer Qwen2, whose queries, keys and values have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**_small(), tie_word_embeddings=False)).eval()
    return Policy(model, character_tokenizer())


@pytest.fixture
def adapted(llama: Policy) -> Policy:
    """The Llama with a LoRA adapter whose two halves are random, so that both have a gradient."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    model = get_peft_model(llama.model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return Policy(model.eval(), llama.tokenizer)


@pytest.fixture
def make_rollouts() -> Callable[..., Rollouts]:
    """Makes rollouts of random tokens for a policy; ``drift`` is how far the sampler is from that policy, in nats."""
    return _make_rollouts


@pytest.fixture
def make_prompts() -> Callable[..., Prompts]:
    """Makes prompts out of pairs of a prompt and its answer, verified by exact match."""

    def make(pairs: list[tuple[str, str]]) -> Prompts:
        messages = [canonical([{"role": "user", "content": prompt}]) for prompt, _ in pairs]
        truths = [truth for _, truth in pairs]
        uids = [prompt_uid(m, t, "made") for m, t in zip(messages, truths, strict=True)]
        n = len(pairs)
        return Prompts(
            tuple(uids), tuple(messages), tuple(truths), ("made",) * n, ("made",) * n, (canonical({"id": "exact"}),) * n
        )

    return make


def _make_rollouts(
    policy: Policy,
    *,
    prompts: int = 3,
    samples: int = 4,
    seed: int = 0,
    temperature: float = 1.0,
    drift: float = 0.1,
    rewards: tuple[float, ...] = (1.0, 0.0, 0.0),
) -> Rollouts:
    rng = np.random.default_rng(seed)
    rows = [(p, k) for p in range(prompts) for k in range(samples + p % 2)]  # groups of unequal size
    asked = [tuple(rng.integers(2, 27, 2 + p).tolist()) for p in range(prompts)]
    said = [tuple(rng.integers(2, 27, rng.integers(1, 6)).tolist()) for _ in rows]
    batch = collate([asked[p] for p, _ in rows], said, policy.pad_id)
    with torch.no_grad():
        logp = token_logps(policy.model, batch, temperature=temperature).double().numpy()
    old = [logp[i, : len(tokens)] + drift * rng.standard_normal(len(tokens)) for i, tokens in enumerate(said)]
    n = len(rows)
    return Rollouts(
        prompt_uid=tuple(f"prompt-{p}" for p, _ in rows),
        sample=tuple(k for _, k in rows),
        policy=("policy",) * n,
        step=(0,) * n,
        prompt_ids=tuple(asked[p] for p, _ in rows),
        completion_ids=tuple(said),
        logp_old=tuple(tuple(x.tolist()) for x in old),
        temperature=(temperature,) * n,
        finish_reason=("stop",) * n,
        seed=(seed,) * n,
        text=("",) * n,
        reward=tuple(rewards[k % len(rewards)] for _, k in rows),
        verdict=tuple("correct" if rewards[k % len(rewards)] else "incorrect" for _, k in rows),
    )


def _small() -> dict[str, object]:
    return {
        "vocab_size": 27,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
