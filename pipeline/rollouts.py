"""K scored completions a prompt, streamed group by group.

A truncated completion that is not correct gets the verdict ``truncated``: it was cut off, not wrong, so it moves no
belief; its reward is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from pipeline.generation import Generate, Group, Request, Sampling
from pipeline.prompts import render
from pipeline.records import Prompts, Rollouts
from pipeline.rewards import Verdict

Score = Callable[[Sequence[tuple[str, str, str]]], list[Verdict]]
"""Scores (verifier, ground truth, completion) triples, in order; see ``pipeline.rewards.VerifierPool.score``."""


def collect(
    prompts: Prompts,
    generate: Generate,
    score: Score,
    tokenizer: object,
    *,
    rollouts: int,
    sampling: Sampling,
    seed: int,
    policy: str,
    step: int = 0,
    chat: bool = False,
) -> Iterator[Rollouts]:
    """Yield the scored rollouts of one prompt after another, as the engine finishes them.

    Args:
        prompts: what to complete.
        generate: the engine.
        score: the verifiers.
        tokenizer: renders prompts and decodes completions.
        rollouts: K, completions a prompt.
        sampling: the sampling distribution.
        seed: keys the draws, with prompt_uid and sample index.
        policy: key of the checkpoint, recorded with each rollout.
        step: optimizer step of the policy, recorded with each rollout.
        chat: render messages with the chat template.
    """
    row = {uid: i for i, uid in enumerate(prompts.prompt_uid)}
    requests = [
        Request(uid, render(messages, tokenizer, chat, uid), rollouts, seed)
        for uid, messages in zip(prompts.prompt_uid, prompts.messages, strict=True)
    ]
    for group in generate(requests, sampling):
        i = row[group.request.prompt_uid]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in group.completion_ids]  # type: ignore[attr-defined]
        verdicts = score([(prompts.verifier[i], prompts.ground_truth[i], text) for text in texts])
        yield _columns(group, texts, verdicts, sampling, policy, step)


def _columns(
    group: Group, texts: list[str], verdicts: list[Verdict], sampling: Sampling, policy: str, step: int
) -> Rollouts:
    n, request = len(texts), group.request
    return Rollouts(
        prompt_uid=(request.prompt_uid,) * n,
        sample=tuple(range(n)),
        policy=(policy,) * n,
        step=(step,) * n,
        prompt_ids=(tuple(request.prompt_ids),) * n,
        completion_ids=tuple(group.completion_ids),
        logp_old=tuple(x.tolist() for x in group.logp),
        temperature=(sampling.temperature,) * n,
        finish_reason=tuple(group.finish_reason),
        seed=(request.seed,) * n,
        text=tuple(texts),
        reward=tuple(float(v.reward) for v in verdicts),
        verdict=tuple(cut_off(v.verdict, r) for v, r in zip(verdicts, group.finish_reason, strict=True)),
    )


def cut_off(verdict: str, finish_reason: str) -> str:
    """Return the verdict of a completion that may have been truncated."""
    return "truncated" if verdict == "incorrect" and finish_reason == "length" else verdict


def match(rollouts: Rollouts, pool: Prompts) -> Rollouts:
    """Return the rollouts that belong to a prompt of the pool.

    Raises:
        ValueError: none does, so that the file was made for other prompts.
    """
    known = set(pool.prompt_uid)
    rows = [i for i, uid in enumerate(rollouts.prompt_uid) if uid in known]
    if not rows:
        raise ValueError(
            f"none of the {len(rollouts)} imported rollouts belongs to the pool's {len(pool)} prompts: "
            "prompt_uid is the hash of (messages, ground truth, data source); make it from the same three"
        )
    return rollouts.take(rows)
