"""The embedded pool: 800 prompts that are heterogeneous on purpose, two validation sets and a test set.

A fifth is on target, a quarter nearly solved, a quarter off the validation families, 15 % hopeless, 15 % wrongly
labelled. The labels of ``nmod`` are the warm policy's own most frequent wrong answers, so that it is rewarded for them.
No prompt is in two of the sets.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from pipeline.embedded.families import TARGETS, distinct, without_carry
from pipeline.generation import Request, Sampling
from pipeline.generation.transformers import TransformersGenerate
from pipeline.policy import Policy
from pipeline.records import keyed_seed

REVISION = 1
POOL = {"easy": 120, "easysub": 80, "add": 80, "sub": 80, "chain": 40, "rev": 130, "sort": 70, "mul": 80}
WRONG = {"nmod": 80, "noisy": 40}
VALIDATION, TEST = 48, 200

Rows = dict[str, list[str]]


def make_sets(policy: Policy, seed: int) -> dict[str, Rows]:
    """Return prompt, ground_truth and ability of ``pool``, ``validation_add``, ``validation_sub`` and ``test``."""
    rng = np.random.default_rng(keyed_seed("embedded sets", seed))
    taken: set[str] = set()
    sets = {f"validation_{family}": _rows(family, distinct(family, VALIDATION, rng, taken)) for family in TARGETS}
    sets["test"] = _join([_rows(family, distinct(family, TEST, rng, taken)) for family in TARGETS])
    parts = [_rows(family, distinct(family, count, rng, taken)) for family, count in POOL.items()]
    for name, count in WRONG.items():
        pairs = [p for f in TARGETS for p in distinct(f, 4 * count if name == "nmod" else count // 2, rng, taken)]
        labels = _own_mistakes(policy, pairs, seed) if name == "nmod" else [without_carry(p) for p, _ in pairs]
        wrong = [
            (prompt, label) for (prompt, true), label in zip(pairs, labels, strict=True) if label not in ("", true)
        ]
        parts.append(_rows(name, wrong[:: max(1, len(wrong) // count)][:count]))
    sets["pool"] = _join(parts)
    return sets


def unlabelled(seed: int) -> dict[str, list[str]]:
    """Return prompts as many and as long as those of ``make_sets``, without the policy that its wrong labels need."""
    rng = np.random.default_rng(keyed_seed("embedded sets", seed))
    taken: set[str] = set()
    sets = {f"validation_{family}": [p for p, _ in distinct(family, VALIDATION, rng, taken)] for family in TARGETS}
    sets["test"] = [p for family in TARGETS for p, _ in distinct(family, TEST, rng, taken)]
    counts = [*POOL.items(), *((f, sum(WRONG.values()) // len(TARGETS)) for f in TARGETS)]
    sets["pool"] = [p for family, count in counts for p, _ in distinct(family, count, rng, taken)]
    return sets


def _own_mistakes(policy: Policy, pairs: list[tuple[str, str]], seed: int) -> list[str]:
    """Return the most frequent wrong answer of 16 samples for each prompt, empty where it made none twice."""
    requests = [Request(prompt, policy.tokenizer(prompt).input_ids, 16, seed) for prompt, _ in pairs]
    truth = dict(pairs)
    labels = {}
    for group in TransformersGenerate(policy)(requests, Sampling(max_new_tokens=6)):
        prompt = group.request.prompt_uid
        texts = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in group.completion_ids]
        wrong = Counter(
            t
            for t, reason in zip(texts, group.finish_reason, strict=True)
            if reason == "stop" and t and t != truth[prompt]
        )
        best = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:1]
        labels[prompt] = best[0][0] if best and best[0][1] > 1 else ""
    return [labels[prompt] for prompt, _ in pairs]


def _rows(family: str, pairs: list[tuple[str, str]]) -> Rows:
    return {
        "prompt": [prompt for prompt, _ in pairs],
        "ground_truth": [answer for _, answer in pairs],
        "ability": [family] * len(pairs),
    }


def _join(parts: list[Rows]) -> Rows:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}
