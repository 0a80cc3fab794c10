r"""Whether an engine samples from the weights that it should: its log-probabilities against a teacher-forced pass.

    0  <=  logp_engine - logp_policy  <=  -log top_p        token by token: a nucleus takes mass from what is left out

Weights of much earlier, another checkpoint behind a server, another tokenizer's ids, or log-probabilities at another
temperature all break it. A difference that rounding explains does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float

from pipeline.generation import Generate, Group, Request, Sampling
from pipeline.policy import Policy, collate, token_logps

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}
"""Largest mean difference a token [nats] that rounding may make between two implementations, by dtype."""

ENOUGH = 64  # tokens of a mean; over a greedy answer of a few, rounding to bfloat16 alone was seen to make .055
FEWEST = 16  # tokens that are judged where a call has no more
ROWS, TOKENS = 2, 256  # of a group, at most: float32 logits of no more than 2 x 257 tokens are held at once


def differences(policy: Policy, group: Group, sampling: Sampling) -> Float[np.ndarray, " tokens"]:
    """Return how far log-probabilities of an engine are outside of what the policy allows [nats], token by token.

    Only the first ``ROWS`` completions are looked at (one, if they are greedy and so all the same), and of each the
    first ``TOKENS`` tokens, which bounds the memory of the pass whatever the group's size is.
    """
    rows = ROWS if sampling.temperature else 1
    completions = [tokens[:TOKENS] for tokens in group.completion_ids[:rows]]
    prompts = [group.request.prompt_ids] * len(completions)
    batch = collate(prompts, completions, policy.pad_id, policy.device)
    with torch.inference_mode():
        expected = token_logps(policy.model, batch, temperature=sampling.temperature).double().cpu().numpy()
    recorded = np.concatenate([x[:TOKENS].astype(float) for x in group.logp[:rows]])
    d = recorded - np.concatenate([row[: len(tokens)] for tokens, row in zip(completions, expected, strict=True)])
    gain = -math.log(sampling.top_p) if sampling.temperature else 0.0
    return np.maximum(np.maximum(-d, d - gain), 0.0)


class Checked:
    """An engine whose first groups are compared with the policy that it should sample from.

    Groups are held back until ``ENOUGH`` of their tokens are compared, or until the call ends; then their mean is
    judged. A call of fewer than ``FEWEST`` tokens passes unjudged.

    The check finds another checkpoint, another temperature, weights of much earlier. It cannot see weights that are one
    small step old: what such a step changes is less than rounding may, and far less in bfloat16.

    Args:
        generate: the engine.
        policy: what it should sample from.
        what: names the engine in the error.

    Raises:
        ValueError: on call, if they disagree by more than rounding.
    """

    def __init__(self, generate: Generate, policy: Policy, what: str) -> None:
        self.generate, self.policy, self.what = generate, policy, what
        self._checked = False

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Complete ``requests`` with the engine."""
        held: list[Group] = []
        found: list[float] = []
        for group in self.generate(requests, sampling):
            held.append(group)
            if not self._checked:
                found.extend(differences(self.policy, group, sampling))
                if len(found) < ENOUGH:
                    continue
                self._judge(found, held)
            yield from held
            held.clear()
        if held and len(found) >= FEWEST:
            self._judge(found, held)
        yield from held

    def _judge(self, found: list[float], groups: list[Group]) -> None:
        dtype = str(next(self.policy.model.parameters()).dtype).removeprefix("torch.")
        mean, most = float(np.mean(found)), TOLERANCE[dtype]
        if not mean <= most:  # NaN is no agreement
            raise ValueError(
                f"{self.what} does not sample from this policy: on {len(groups)} prompt(s) from "
                f"{groups[0].request.prompt_uid} on, its log-probabilities are off by {mean:.3g} nats a token, and "
                f"{dtype} explains {most:g}: it holds other weights, or reports log-probabilities before temperature "
                "and nucleus (vllm serve needs --logprobs-mode processed_logprobs)"
            )
        self._checked = True
