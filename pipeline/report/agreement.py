"""Scores against measured effects: the names, the table and the words; the pictures are in ``dots``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report.text import MISSING, count, number, signed

Facts = Mapping[str, Any]

SCORES = {
    "cropi": "CROPI cosine", "cropi_sketch": "the same, projected", "dot": "dot product",
    "directional": "directional dot", "insight": "InSight (WMI)", "variance": "p (1 - p)", "norm": "gradient norm",
    "uniform": "random", "exact": "exact target (limit)",
}  # fmt: skip
EFFECTS = {
    "unit": "small step of fixed length", "raw": "small step along the gradient",
    "other": "step on other rollouts", "left_out": "left out of training",
}  # fmt: skip


def describe(validity: Facts | None) -> dict[str, Any]:
    """Return the table of agreements on the validation sets and the lines above it; None and none if not measured."""
    if validity is None:
        return {"validity_table": None, "validity_lines": []}
    measured, found = effects(validity), validity["agreement"]
    rows = [
        {"name": name(score), "cells": [_cell(found[e]["validation"].get(score)) for e in measured]}
        for score in scores(validity)
    ]
    return {
        "validity_table": {"effects": [EFFECTS.get(e, e) for e in measured], "rows": rows},
        "validity_lines": _lines(validity),
    }


def _lines(validity: Facts) -> list[str]:
    prompts, step = validity["prompts"], validity["step"]
    where = "the starting policy" if step == 0 else f"the curriculum\u2019s policy after {count(step)} steps"
    lines = [
        f"Seed {validity['seed']}, {where}: {count(prompts['asked'])} prompts with {count(validity['rollouts'])} "
        f"rollouts each, of which {count(prompts['signal'])} have a gradient; {count(prompts['pool'])} of them were "
        "left out of training in turn.",
        f"The target was estimated from {count(validity['validation_rollouts'])} rollouts a validation prompt; its "
        f"cosine to the exact gradient of the expected reward is {number(validity['target_cosine'], 2)}.",
    ]
    reliability = [f"{name(score)} {number(r['whole'], 2)}" for score, r in validity["reliability"].items()]
    lines.append(f"Reliability over the rollouts of a prompt (split halves, Spearman-Brown): {', '.join(reliability)}.")
    noise = validity["dtype"]
    if noise is not None:
        lines.append(
            f"Gradients in {noise['dtype']} have a mean cosine of {number(noise['mean'], 4)} to those in float32, the "
            f"least of {count(noise['prompts'])} prompts {number(noise['least'], 4)}."
        )
    return lines


def effects(validity: Facts) -> list[str]:
    """Return the effects that were measured, the smallest step first."""
    found = validity["agreement"]
    return [e for e in EFFECTS if e in found] + sorted(set(found) - set(EFFECTS))


def scores(validity: Facts) -> list[str]:
    """Return the scores that were compared; what knows the answers comes last."""
    found = next(iter(validity["agreement"].values()))["validation"]
    known = [score for score in SCORES if score in found]
    return known[:-1] + sorted(set(found) - set(SCORES)) + known[-1:]


def name(score: str) -> str:
    """Return the score's name as words."""
    return SCORES.get(score, score)


def _cell(found: Facts | None) -> str:
    if found is None or found["rho"] is None:
        return MISSING
    return f"{signed(found['rho'], 2)} [{signed(found['low'], 2)}, {signed(found['high'], 2)}]"
