r"""Whether an engine samples from the weights that it should: its log-probabilities against a teacher-forced pass.

    0  <=  logp_engine - logp_policy  <=  -log top_p        token by token: a nucleus takes mass from what is left out

Stale weights, another checkpoint behind a server, another tokenizer's ids, or log-probabilities at another temperature
all break it. A difference that rounding explains does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pipeline.generation import Generate, Group, Request, Sampling
from pipeline.policy import Policy, collate, token_logps

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}
"""Largest mean difference a token [nats] that rounding may make between two implementations, by dtype."""


def disagreement(policy: Policy, group: Group, sampling: Sampling) -> float:
    """Return the mean distance of an engine's log-probabilities from what the policy allows [nats a token]."""
    batch = collate([group.request.prompt_ids] * len(group.logp), group.completion_ids, policy.pad_id, policy.device)
    with torch.inference_mode():
        expected = token_logps(policy.model, batch, temperature=sampling.temperature).double().cpu().numpy()
    gain = -math.log(sampling.top_p) if sampling.temperature else 0.0
    difference = [x.astype(float) - row[: len(x)] for x, row in zip(group.logp, expected, strict=True)]
    outside = [np.maximum(np.maximum(-d, d - gain), 0.0) for d in difference]
    return float(np.concatenate(outside).mean())


class Checked:
    """An engine whose first group is compared with the policy that it should sample from.

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
        for group in self.generate(requests, sampling):
            if not self._checked:
                self._check(group, sampling)
                self._checked = True
            yield group

    def _check(self, group: Group, sampling: Sampling) -> None:
        dtype = str(next(self.policy.model.parameters()).dtype).removeprefix("torch.")
        found, most = disagreement(self.policy, group, sampling), TOLERANCE[dtype]
        if not found <= most:  # NaN is no agreement
            raise ValueError(
                f"{self.what} does not sample from this policy: on prompt {group.request.prompt_uid} its log-"
                f"probabilities are off by {found:.3g} nats a token, and {dtype} explains {most:g}: it holds other "
                "weights, or reports log-probabilities before temperature and nucleus (vllm serve needs "
                "--logprobs-mode processed_logprobs)"
            )
