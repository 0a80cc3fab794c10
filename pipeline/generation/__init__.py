"""Generation: a ``Generate`` callable turns prompts into groups of sampled completions.

The contract, whichever engine is behind it:

- completions are token ids, never re-tokenised text; the end token is kept where it was sampled;
- ``logp`` is the log-probability of each sampled token under the distribution that was sampled from, temperature and
  nucleus included, so that an importance ratio against it is a true likelihood ratio;
- a draw depends on (seed, prompt_uid, sample index) alone: batch mates, order and sharding change nothing;
- groups are yielded as they finish, so that a stopped process loses at most the groups in flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """The sampling distribution.

    Attributes:
        temperature: logits are divided by it; 0 means greedy decoding, with log-probabilities at temperature 1.
        top_p: nucleus mass; 1 keeps the whole vocabulary.
        max_new_tokens: a completion that reaches it without an end token finishes by ``length``.
        stop: single characters; a token whose text contains one ends the completion, as the end token does.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One prompt to complete ``n`` times.

    Attributes:
        prompt_uid: identity, which keys the draw.
        prompt_ids: token ids, without padding.
        n: number of completions.
        seed: the run's seed; the draw of completion ``j`` is keyed by (seed, prompt_uid, j).
    """

    prompt_uid: str
    prompt_ids: Sequence[int]
    n: int
    seed: int


@dataclass(frozen=True)
class Group:
    """The completions of one request.

    Attributes:
        request: what was asked.
        completion_ids: ``n`` sequences of token ids.
        logp: ``n`` float32 arrays, one value a token [nats].
        finish_reason: ``n`` times ``stop`` or ``length``.
    """

    request: Request
    completion_ids: list[list[int]]
    logp: list[np.ndarray]
    finish_reason: list[str]


@runtime_checkable
class Generate(Protocol):
    """Anything that completes requests under a sampling distribution, yielding each group as it finishes."""

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Complete ``requests``; every request comes back exactly once, in any order."""
        ...
