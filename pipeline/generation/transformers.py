r"""A ``Generate`` on ``transformers``: batched, left-padded, cached, with draws keyed by identity.

    p = top_p(softmax(logits / T))                x = min { v : sum_{u <= v} p_u > U },   U uniform, keyed
    logp = log p_x

U depends on (seed, prompt_uid, sample, position) alone, so that neither batch mates nor order change a draw beyond the
rounding of the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.generation import Group, Request, Sampling
from pipeline.generation.endings import check_room, end_tokens, own_ends
from pipeline.policy import Batch, Policy, collate, positions
from pipeline.records import keyed_seed


class TransformersGenerate:
    """Sampling from a loaded policy.

    Args:
        policy: the policy that samples.
        batch_tokens: most prompt and completion tokens that are held at once; bounds the cache's memory.

    Raises:
        ValueError: on call, if a prompt and its completion exceed the context length (the message names the prompt), or
            the tokenizer has no end token.
    """

    def __init__(self, policy: Policy, *, batch_tokens: int = 16_384) -> None:
        self.policy, self.batch_tokens = policy, batch_tokens

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Group]:
        """Complete ``requests``, shortest prompts first, yielding each group as its batch ends."""
        check_room(requests, sampling, self.policy.context_length)
        pending = sorted(requests, key=lambda r: (len(r.prompt_ids), r.prompt_uid))
        while pending:
            width = len(pending[-1].prompt_ids) + sampling.max_new_tokens
            batch: list[Request] = []
            rows = 0
            while pending and (not batch or (rows + pending[0].n) * width <= self.batch_tokens):
                rows += pending[0].n
                batch.append(pending.pop(0))
            yield from self._batch(batch, sampling)

    @torch.inference_mode()
    def _batch(self, requests: list[Request], sampling: Sampling) -> Iterator[Group]:
        policy = self.policy
        ends = end_tokens(policy.tokenizer, own_ends(policy), sampling.stop)
        counts = torch.tensor([r.n for r in requests], device=policy.device)
        one = collate([r.prompt_ids for r in requests], [()] * len(requests), policy.pad_id, policy.device)
        ids, attention = (x.repeat_interleave(counts, dim=0) for x in (one.input_ids, one.attention_mask))
        draw = _Draw(requests, sampling, policy.device)
        output = policy.model.generate(
            input_ids=ids,
            attention_mask=attention,
            past_key_values=self._shared_prefix(one, counts),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # the logits processor draws: it leaves one finite score a row
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=[draw],
            eos_token_id=list(ends),
            pad_token_id=policy.pad_id,
        )[:, ids.shape[1] :].tolist()
        logp = torch.stack(draw.logp, dim=1).cpu().numpy()
        row = 0
        for request in requests:
            if np.isnan(logp[row : row + request.n, 0]).any():
                raise FloatingPointError(
                    f"prompt {request.prompt_uid}: the policy's log-probabilities are not finite; its weights hold NaN"
                )
            cut = [_cut(output[row + j], ends) for j in range(request.n)]
            yield Group(
                request=request,
                completion_ids=[tokens for tokens, _ in cut],
                logp=[logp[row + j, : len(tokens)].copy() for j, (tokens, _) in enumerate(cut)],
                finish_reason=[reason for _, reason in cut],
            )
            row += request.n

    def _shared_prefix(self, one: Batch, counts: Tensor) -> Any:
        """Return the cache of each prompt but its last token, computed once and repeated for its completions."""
        if one.input_ids.shape[1] == 1:
            return None
        cache = self.policy.model(
            input_ids=one.input_ids[:, :-1],
            attention_mask=one.attention_mask[:, :-1],
            position_ids=positions(one.attention_mask)[:, :-1],
            logits_to_keep=1,
            use_cache=True,
        ).past_key_values
        cache.batch_select_indices(torch.arange(len(counts), device=counts.device).repeat_interleave(counts))
        return cache


class _Draw:
    """Logits processor that draws one token a row by the inverse of the cumulative distribution."""

    def __init__(self, requests: list[Request], sampling: Sampling, device: torch.device) -> None:
        self.sampling, self.position = sampling, 0
        self.logp: list[Tensor] = []
        uniform = [
            np.random.Generator(np.random.Philox(keyed_seed("draw", r.seed, r.prompt_uid, j))).random(
                sampling.max_new_tokens
            )
            for r in requests
            for j in range(r.n)
        ]
        self.uniform = torch.from_numpy(np.stack(uniform)).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp = torch.log_softmax(scores.float() / (self.sampling.temperature or 1.0), dim=-1)
        if self.sampling.top_p < 1.0:
            logp = _nucleus(logp, self.sampling.top_p)
        if self.sampling.temperature == 0.0:
            token = logp.argmax(dim=-1, keepdim=True)
        else:
            mass = logp.double().exp().cumsum(dim=-1)  # float64: a float32 sum over a large vocabulary drifts
            target = self.uniform[:, self.position, None] * mass[:, -1:]
            token = torch.searchsorted(mass, target, right=True).clamp(max=logp.shape[1] - 1)
        self.logp.append(logp.gather(1, token).squeeze(1))
        self.position += 1
        return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)


def _nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens with mass ``top_p`` and renormalise."""
    ordered, order = logp.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    kept = torch.where(before < top_p, ordered, float("-inf"))
    return torch.log_softmax(torch.full_like(logp, float("-inf")).scatter(1, order, kept), dim=-1)


def _cut(tokens: list[int], ends: tuple[int, ...]) -> tuple[list[int], str]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1], "stop"
    return tokens, "length"
