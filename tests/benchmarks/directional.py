"""Dot scores from forward passes against those of the gradients themselves: time, and whether they rank alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from pipeline.directional import dot_scores, target_direction
from pipeline.gradients import prompt_gradients
from pipeline.policy import Policy
from pipeline.records import Rollouts
from tests.benchmarks.measure import Row, ratio
from tests.benchmarks.policies import SMOLLM2, arithmetic, learned, llama, random_rollouts

SUBJECT, OBJECTIVE = "directional", "grpo_sequence"


def measure(small: bool) -> Iterator[Row]:
    """Yield time and agreement on the embedded policy and on a model of SmolLM2's shape, whole and with an adapter."""
    validation = arithmetic(60, 2)
    yield from _compare("embedded", learned(), arithmetic(60 if small else 400, 1), validation, ("<= 0.5", ">= 0.999"))
    shape = {**SMOLLM2, "num_hidden_layers": 2} if small else SMOLLM2
    vocabulary = SMOLLM2["vocab_size"]
    assert isinstance(vocabulary, int)
    rollouts = random_rollouts(vocabulary, 24, 64, 4, 16)
    first = rollouts.take(range(16))
    policy = llama(shape)
    yield from _compare("SmolLM2-135M's shape", policy, rollouts, first, ("", ">= 0.999"), pairs=1 if small else 3)
    yield from _compare(
        "the same, LoRA of rank 8", _adapted(policy), rollouts, first, ("", ">= 0.999"), pairs=1 if small else 3
    )


def exact_dots(policy: Policy, rollouts: Rollouts, direction: dict[str, Tensor]) -> np.ndarray:
    """Return the inner product of each prompt's whole gradient with the direction."""
    out = torch.zeros(len(rollouts.groups()), dtype=torch.float64)

    def sink(name: str, prompts: slice, grads: Tensor, rows: Tensor | None = None) -> None:
        v = direction[name] if rows is None else direction[name][rows]
        out[prompts] += grads.flatten(1).double() @ v.flatten().double()

    prompt_gradients(policy, rollouts, OBJECTIVE, sink, micro_tokens=4096)
    return out.numpy()


def _compare(
    name: str, policy: Policy, rollouts: Rollouts, validation: Rollouts, bars: tuple[str, str], pairs: int = 5
) -> Iterator[Row]:
    direction = target_direction(policy, validation, OBJECTIVE, size=len(validation.groups()), micro_tokens=4096)
    count = len(rollouts.groups())
    time = ratio(
        lambda: dot_scores(policy, rollouts, OBJECTIVE, direction),
        lambda: prompt_gradients(policy, rollouts, OBJECTIVE, lambda *part, **rows: None, micro_tokens=4096),
        pairs,
    )
    yield Row(SUBJECT, f"dot scores / a gradient per prompt, {name}", time, bar=bars[0], note=f"{count} prompts")
    ours, exact = dot_scores(policy, rollouts, OBJECTIVE, direction)[1], exact_dots(policy, rollouts, direction)
    yield Row(SUBJECT, f"Spearman with the exact dots, {name}", float(spearmanr(ours, exact)[0]), "", bars[1],
              f"1 - r = {1 - np.corrcoef(ours, exact)[0, 1]:.1e}")  # fmt: skip


def _adapted(policy: Policy) -> Policy:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return Policy(
        get_peft_model(policy.model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")), policy.tokenizer
    )
