"""The embedded policy: a Llama of 335 k parameters over characters, warm-started by supervised learning.

400 batches of 64 at a step size of 2e-3 take it to a quarter of ``add`` and ``sub``: far enough to be
rewarded sometimes, far from done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pipeline.embedded.families import ALPHABET, TRAINING_MIX, example
from pipeline.policy import Policy, collate, token_logps
from pipeline.records import keyed_seed

REVISION = 1


def character_tokenizer() -> Any:
    """Return a tokenizer with one token a character, an end token and a padding token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=32
    )


def untrained_policy(seed: int) -> Policy:
    """Return the policy before its warm start; the weights are a function of ``seed``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = character_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(keyed_seed("embedded weights", seed) % 2**32)
    return Policy(LlamaForCausalLM._from_config(config, attn_implementation="eager"), tokenizer)


def warm_start(
    seed: int = 0, *, batches: int = 400, batch: int = 64, lr: float = 2e-3, progress: Callable[[int, int], None]
) -> Policy:
    """Train the policy on true answers and return it.

    Args:
        seed: of the weights and of the examples.
        batches: optimizer steps.
        batch: examples a step.
        lr: step size of AdamW after 50 steps of warm-up.
        progress: called with (done, total) after each batch.
    """
    policy = untrained_policy(seed)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    rng = np.random.default_rng(keyed_seed("embedded examples", seed))
    names, mix = list(TRAINING_MIX), np.array(list(TRAINING_MIX.values()))
    policy.model.train()
    for step in range(batches):
        pairs = [example(names[i], rng) for i in rng.choice(len(names), batch, p=mix / mix.sum())]
        prompts = [policy.tokenizer(prompt).input_ids for prompt, _ in pairs]
        answers = [[*policy.tokenizer(answer).input_ids, policy.tokenizer.eos_token_id] for _, answer in pairs]
        rectangle = collate(prompts, answers, policy.pad_id)
        loss = -token_logps(policy.model, rectangle).sum() / rectangle.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(step + 1, batches)
    policy.model.eval()
    return policy
