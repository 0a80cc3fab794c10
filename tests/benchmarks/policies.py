"""Policies and rollouts to measure on."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch

from pipeline.advantages import has_signal
from pipeline.embedded.families import TRAINING_MIX, distinct
from pipeline.embedded.warm_start import warm_start
from pipeline.generation import Request, Sampling
from pipeline.generation.transformers import TransformersGenerate
from pipeline.policy import Policy
from pipeline.records import Rollouts

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""The shape of SmolLM2-135M."""
TWO_LAYERS = {**SMOLLM2, "vocab_size": 512, "num_hidden_layers": 2, "tie_word_embeddings": False}
"""Two of its layers and a small vocabulary: 7.7 M parameters; untied, because opacus does not know tied weights."""


def llama(shape: dict[str, object], *, attention: str = "sdpa", seed: int = 0) -> Policy:
    """Return a Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**shape, bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=2048)
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    return Policy(model.eval(), SimpleNamespace(pad_token_id=0))


def rollouts_of(asked: list[list[int]], said: list[list[list[int]]]) -> Rollouts:
    """Return rollouts of some prompts, every other one of a prompt rewarded, as if sampled uniformly."""
    rows = [
        (
            str(p),
            k,
            "policy",
            0,
            tuple(prompt),
            tuple(c),
            (-1.0,) * len(c),
            1.0,
            "stop",
            0,
            "",
            float(k % 2 == 0),
            "correct",
        )
        for p, (prompt, completions) in enumerate(zip(asked, said, strict=True))
        for k, c in enumerate(completions)
    ]
    return Rollouts(*map(tuple, zip(*rows, strict=True)))


def random_rollouts(vocabulary: int, prompts: int, prompt_tokens: int, samples: int, tokens: int) -> Rollouts:
    """Return rollouts of random tokens; a packed row has ``prompt_tokens + samples * tokens`` of them."""
    rng = np.random.default_rng(0)
    asked = rng.integers(2, vocabulary, (prompts, prompt_tokens)).tolist()
    return rollouts_of(asked, rng.integers(2, vocabulary, (prompts, samples, tokens)).tolist())


@cache
def learned(batches: int = 300) -> Policy:
    """Return the embedded policy after a part of its warm start: it is right often enough to have gradients."""
    return warm_start(0, batches=batches, progress=lambda done, total: None)


@cache
def arithmetic(prompts: int, seed: int) -> Rollouts:
    """Return 8 rollouts of ``learned`` for each of about ``prompts`` prompts, those without signal left out."""
    policy = learned()
    rng, taken = np.random.default_rng(seed), set[str]()
    pairs = [p for f in TRAINING_MIX for p in distinct(f, -(-prompts // len(TRAINING_MIX)), rng, taken)]
    truth = dict(pairs)
    requests = [Request(prompt, policy.tokenizer(prompt).input_ids, 8, seed) for prompt in truth]
    rows = []
    for g in TransformersGenerate(policy)(requests, Sampling(max_new_tokens=6)):
        uid = g.request.prompt_uid
        texts = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in g.completion_ids]
        rewards = np.array([float(text == truth[uid]) for text in texts])
        if has_signal(rewards):
            rows += [
                (uid, j, "p", 0, tuple(g.request.prompt_ids), tuple(ids), g.logp[j].tolist(), 1.0, g.finish_reason[j], seed,
                 texts[j], rewards[j].item(), "correct" if rewards[j] else "incorrect")
                for j, ids in enumerate(g.completion_ids)
            ]  # fmt: skip
    return Rollouts(*map(tuple, zip(*rows, strict=True)))
