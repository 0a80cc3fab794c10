"""What engines agree on: the tokens that end a completion, the room that it needs, the seed of a request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pipeline.generation import Request, Sampling
from pipeline.records import keyed_seed


def end_tokens(tokenizer: Any, stop: tuple[str, ...]) -> tuple[int, ...]:
    """Return the ids that end a completion: the end token, and each token whose text holds a ``stop`` character.

    Raises:
        ValueError: a stop string is longer than one character, so that it could fall between two tokens.
    """
    long = [s for s in stop if len(s) != 1]
    if long:
        raise ValueError(
            f"sampling.stop = {long}: stop strings are single characters; use the one that ends the answer"
        )
    return _end_tokens(tokenizer, stop)


@lru_cache(maxsize=8)
def _end_tokens(tokenizer: Any, stop: tuple[str, ...]) -> tuple[int, ...]:
    ends = {int(tokenizer.eos_token_id)}
    if stop:
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        ends |= {i for i, text in enumerate(texts) if any(s in text for s in stop)}
    return tuple(sorted(ends))


def check_room(requests: Sequence[Request], sampling: Sampling, limit: int) -> None:
    """Refuse prompts that leave no room for a completion in a context of ``limit`` tokens.

    Raises:
        ValueError: a prompt and its completion exceed the limit; the message names the prompt.
    """
    for request in requests:
        if len(request.prompt_ids) + sampling.max_new_tokens > limit:
            raise ValueError(
                f"prompt {request.prompt_uid} has {len(request.prompt_ids)} tokens; with max_new_tokens = "
                f"{sampling.max_new_tokens} it exceeds the context of {limit}: drop it or lower max_new_tokens"
            )


def first_seed(request: Request) -> int:
    """Return the seed by which vLLM draws a request's first sample; it draws sample ``j`` by the j-th after it."""
    return keyed_seed("draw", request.seed, request.prompt_uid) % 2**62
