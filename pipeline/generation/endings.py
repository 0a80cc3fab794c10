"""What engines agree on: the tokens that end a completion, the room that it needs, the seed of a request."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pipeline.generation import Request, Sampling
from pipeline.policy import Policy
from pipeline.records import keyed_seed


def own_ends(policy: Policy) -> tuple[int, ...]:
    """Return the ids that a policy ends with: its tokenizer's end token, and those that its generation config names.

    Chat models such as Gemma name the end of a turn in the latter alone.

    Raises:
        ValueError: the tokenizer has no end token.
    """
    end, tokenizer = policy.tokenizer.eos_token_id, policy.tokenizer
    if end is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} ({type(tokenizer).__name__}) has no end token, so that no "
            "completion could end: name one as eos_token in the checkpoint's tokenizer_config.json"
        )
    named = getattr(getattr(policy.model, "generation_config", None), "eos_token_id", None)
    more = [] if named is None else [named] if isinstance(named, int) else named
    return tuple(sorted({int(end), *map(int, more)}))


def end_tokens(tokenizer: Any, own: tuple[int, ...], stop: tuple[str, ...]) -> tuple[int, ...]:
    """Return the ids that end a completion: ``own_ends``, and each token whose text holds a ``stop`` character.

    Raises:
        ValueError: a stop string is longer than one character, so that it could fall between two tokens.
    """
    long = [s for s in stop if len(s) != 1]
    if long:
        raise ValueError(
            f"sampling.stop = {long}: stop strings are single characters; use the one that ends the answer"
        )
    return tuple(sorted({*own, *_stopping(tokenizer, stop)}))


@lru_cache(maxsize=8)
def _stopping(tokenizer: Any, stop: tuple[str, ...]) -> tuple[int, ...]:
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))]) if stop else []
    return tuple(i for i, text in enumerate(texts) if any(s in text for s in stop))


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
