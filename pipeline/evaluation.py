r"""How good a policy is, and how sure we are.

Where the answer is unique, the expected reward needs no sampling:

    P(correct | prompt) = prod_t pi(y_t | prompt, y_<t)         y = answer tokens, then the end token

Intervals are Student's t over paired seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import t as student_t
from torch import Tensor

from pipeline.generation import Generate, Sampling
from pipeline.policy import Batch, Policy, collate, token_logps
from pipeline.prompts import render
from pipeline.records import Prompts, canonical
from pipeline.rollouts import Score, collect

EXACT = canonical({"id": "exact"})


@torch.inference_mode()
def exact_reward(
    policy: Policy, prompts: Prompts, *, chat: bool = False, rows: int = 512
) -> Float[np.ndarray, " prompts"]:
    """Return P(correct) of each prompt at temperature 1.

    Raises:
        ValueError: a prompt is not verified by exact match, so that its answer is not unique.
    """
    reward = chances(policy, answer_batches(policy, prompts, chat=chat, rows=rows)).cpu().numpy()
    if not np.isfinite(reward).all():
        bad = prompts.prompt_uid[int(np.flatnonzero(~np.isfinite(reward))[0])]
        raise FloatingPointError(f"prompt {bad}: the policy's log-probabilities are not finite; its weights hold NaN")
    return reward


def expected_reward_gradient(
    policy: Policy, prompts: Prompts, *, chat: bool = False, rows: int = 512
) -> dict[str, Tensor]:
    """Return the gradient of the mean P(correct), by parameter in float32: no sampling, one backward pass.

    Raises:
        ValueError: a prompt is not verified by exact match, so that its answer is not unique.
    """
    parameters = policy.trainable()
    total = {name: torch.zeros(p.shape, device=p.device) for name, p in parameters.items()}
    for batch in answer_batches(policy, prompts, chat=chat, rows=rows):
        value = chances(policy, [batch]).sum() / len(prompts)
        for name, grad in zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True):
            total[name] += grad
    return total


def answer_batches(policy: Policy, prompts: Prompts, *, chat: bool = False, rows: int = 512) -> list[Batch]:
    """Return prompts and their answers as token ids, ``rows`` prompts a batch; they serve as often as is needed.

    Raises:
        ValueError: a prompt is not verified by exact match, so that its answer is not unique.
    """
    require_exact(prompts)
    end = policy.tokenizer.eos_token_id
    pairs = zip(prompts.prompt_uid, prompts.messages, strict=True)
    asked = [render(messages, policy.tokenizer, chat, uid) for uid, messages in pairs]
    answers = [[*policy.tokenizer(answer, add_special_tokens=False).input_ids, end] for answer in prompts.ground_truth]
    return [
        collate(asked[i : i + rows], answers[i : i + rows], policy.pad_id, policy.device)
        for i in range(0, len(prompts), rows)
    ]


def require_exact(prompts: Prompts, name: str = "prompts") -> None:
    """Raise ValueError where a prompt is not verified by exact match, so that its expected reward needs sampling."""
    other = [v for v in prompts.verifier if v != EXACT]
    if other:
        raise ValueError(
            f"{name}: exact expected reward needs verifier {EXACT}; {len(other)} of {len(prompts)} prompt(s) have "
            f"another: {other[0]}; give them unique answers and that verifier"
        )


def chances(policy: Policy, batches: Sequence[Batch]) -> Float[Tensor, " prompts"]:
    """Return P(correct) of each prompt of ``answer_batches``, with its graph where gradients are on."""
    return torch.cat([token_logps(policy.model, batch).sum(dim=1).exp() for batch in batches])


def greedy_accuracy(
    policy: Policy,
    prompts: Prompts,
    generate: Generate,
    score: Score,
    *,
    max_new_tokens: int,
    stop: tuple[str, ...],
    chat: bool,
) -> float:
    """Return the share of prompts whose greedy completion is correct."""
    sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens, stop=stop)
    groups = collect(
        prompts, generate, score, policy.tokenizer, rollouts=1, sampling=sampling, seed=0, policy="", chat=chat
    )
    return float(np.mean([group.verdict[0] == "correct" for group in groups]))


def interval(values: Sequence[float], *, level: float = 0.95) -> dict[str, float | int | None]:
    """Return mean, half width of its Student interval, and n; no half width for a single value."""
    x = np.asarray(values, float)
    n = len(x)
    half = float(student_t.ppf(0.5 + level / 2, n - 1) * x.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return {"mean": float(x.mean()), "half_width": half, "n": n}
