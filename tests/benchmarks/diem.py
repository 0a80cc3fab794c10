"""What weighting a step costs, each way, and how the cheap ways rank against the exact one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from scipy.stats import spearmanr

from pipeline.advantages import has_signal
from pipeline.embedded.families import TRAINING_MIX, distinct
from pipeline.evaluation import EXACT, expected_reward_gradient
from pipeline.features import project, projection_for, sketch_gradients
from pipeline.generation import Sampling
from pipeline.generation.transformers import TransformersGenerate
from pipeline.policy import Policy
from pipeline.records import Prompts, Rollouts, canonical, prompt_uid
from pipeline.reference import Reference
from pipeline.reweight import diem_weights
from pipeline.rollouts import collect
from pipeline.scope import last_block
from pipeline.training import ONLINE
from pipeline.verifiers import verify
from pipeline.weighted import WAYS, plain
from tests.benchmarks.measure import Row
from tests.benchmarks.policies import SMOLLM2, learned, llama, random_rollouts

SUBJECT = "diem"
BATCH, ROLLOUTS, TOKENS = 16, 8, 16_384
BARS = {"exact": "<= 1.15", "bookkeeping": "<= 1.1", "scope": "<= 1.03"}


def measure(small: bool) -> Iterator[Row]:
    """Yield whole-step overheads and rank correlations on the embedded policy, and the update's on SmolLM2's shape."""
    policy, prompts = learned(), _prompts(200)
    validation = prompts.take(range(100, 196))
    references = {way: _reference(policy, way, expected_reward_gradient(policy, validation)) for way in WAYS}
    batches = [_sampled(policy, prompts.take(range(i, i + BATCH)), i) for i in range(0, 32 if small else 96, BATCH)]
    yield from _overheads(policy, references, batches, repeats=2 if small else 6)
    yield from _ranks(policy, references, [live for live, _ in batches])
    shape = {**SMOLLM2, "num_hidden_layers": 3} if small else SMOLLM2
    large = llama(shape)
    rollouts = random_rollouts(512, 4, 64, 4, 32)
    aim = {name: torch.randn(p.shape) for name, p in large.trainable().items()}
    for way in ("bookkeeping", "scope"):
        reference = _reference(large, way, aim)
        seconds = [
            (_update(large, rollouts, reference), _update(large, rollouts, None)) for _ in range(2 if small else 4)
        ]
        value = statistics.median(a / b for a, b in seconds[1:])
        yield Row(SUBJECT, f"update, {way} / plain, SmolLM2-135M's shape", value, note="4 prompts of 192 tokens")


def _overheads(
    policy: Policy, references: dict[str, Reference], batches: list[tuple[Rollouts, float]], repeats: int
) -> Iterator[Row]:
    spent: dict[str, list[float]] = {way: [] for way in references}
    share = []
    for _ in range(repeats):
        for live, sampled in batches:
            base = _update(policy, live, None)
            share.append(base / (base + sampled))
            for way, reference in references.items():
                spent[way].append((_update(policy, live, reference) + sampled) / (base + sampled))
    note = f"an update is {statistics.median(share):.2f} of a plain step"
    for way, ratios in spent.items():
        name = f"whole step, {way} / plain, embedded default"
        yield Row(SUBJECT, name, statistics.median(ratios), bar=BARS[way], note=note)


def _ranks(policy: Policy, references: dict[str, Reference], batches: list[Rollouts]) -> Iterator[Row]:
    importance: dict[str, list[np.ndarray]] = {way: [] for way in references}
    weights: dict[str, list[np.ndarray]] = {way: [] for way in references}
    for way, reference in references.items():
        scope = reference.block[1] if reference.block else None
        for live in batches:
            rows = sketch_gradients(policy, live, ONLINE, reference.projection, scope=scope)[1].astype(float)
            importance[way].append(rows @ reference.direction)
            weights[way].append(diem_weights(rows @ rows.T, importance[way][-1], ridge=reference.ridge))
    for way in ("bookkeeping", "scope"):
        for name, table in (("importance", importance), ("weights", weights)):
            ranks = [spearmanr(a, b)[0] for a, b in zip(table[way], table["exact"], strict=True)]
            note = f"mean of {len(ranks)} batches"
            yield Row(SUBJECT, f"Spearman of {name}, {way} with exact", float(np.mean(ranks)), "", note=note)


def _update(policy: Policy, rollouts: Rollouts, reference: Reference | None) -> float:
    """Return the seconds of making the batch's gradient."""
    policy.model.zero_grad(set_to_none=True)
    began = time.perf_counter()
    if reference is None:
        plain(policy, rollouts, ONLINE, micro_tokens=TOKENS)
    else:
        way = WAYS[reference.way]
        way(
            policy, rollouts, ONLINE, weigh=lambda z: reference.weigh(z, 0)[0], micro_tokens=TOKENS, **reference.options
        )
    return time.perf_counter() - began


def _reference(policy: Policy, way: str, gradient: dict[str, torch.Tensor]) -> Reference:
    block = last_block(policy.model) if way == "scope" else None
    kind, dim = ("sparse", 8192) if way == "exact" else ("factored", 1024)
    projection = projection_for(policy, dim, kind=kind, scope=block[1] if block else None)
    return Reference("validation", way, projection, project(projection, gradient), 0.1, 0.25, block=block)


def _sampled(policy: Policy, prompts: Prompts, step: int) -> tuple[Rollouts, float]:
    """Return the rollouts of a batch that have signal, and the seconds of sampling and scoring all of it."""
    began = time.perf_counter()
    made = Rollouts.concat(
        collect(
            prompts,
            TransformersGenerate(policy),
            lambda items: [verify({"id": "exact"}, truth, text) for _, truth, text in items],
            policy.tokenizer,
            rollouts=ROLLOUTS,
            sampling=Sampling(max_new_tokens=6),
            seed=0,
            policy="",
            step=step,
        )
    )
    seconds = time.perf_counter() - began
    groups = made.groups().values()
    live = [i for rows in groups if has_signal(np.array([made.reward[r] for r in rows])) for i in rows]
    return made.take(live), seconds


def _prompts(count: int) -> Prompts:
    rng, taken = np.random.default_rng(0), set[str]()
    pairs = [p for f in TRAINING_MIX for p in distinct(f, -(-count // len(TRAINING_MIX)), rng, taken)][:count]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    messages = tuple(canonical([{"role": "user", "content": asked}]) for asked, _ in pairs)
    truths, n = tuple(answer for _, answer in pairs), len(pairs)
    uids = tuple(prompt_uid(m, t, "benchmark") for m, t in zip(messages, truths, strict=True))
    return Prompts(uids, messages, truths, ("benchmark",) * n, ("",) * n, (EXACT,) * n)
