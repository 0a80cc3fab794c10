"""The experiment's own arithmetic: its reference gradient, and what it says of its runs."""

import numpy as np
import pytest
import torch

from pipeline.evaluation import exact_reward
from pipeline.records import canonical
from tests.experiments.diem import compare, expected_reward_gradient, show


def test_the_reference_is_the_slope_of_the_expected_reward(llama, make_prompts):
    """A small step along the gradient changes mean P(correct) by step times squared length, to 1 %."""
    prompts = make_prompts([("12+34=", "64"), ("R=", "1"), ("Sab=", "ab")])
    assert set(prompts.verifier) == {canonical({"id": "exact"})}
    gradient = expected_reward_gradient(llama, prompts)
    assert set(gradient) == set(llama.trainable())
    squared = sum(float((g.double() ** 2).sum()) for g in gradient.values())
    size, levels = 1e-3 / squared**0.5, []
    for sign in (-1, 2):  # to one side, then to the other
        with torch.no_grad():
            for name, parameter in llama.trainable().items():
                parameter += sign * size * gradient[name]
        levels.append(exact_reward(llama, prompts).astype(float).mean())
    assert (levels[1] - levels[0]) / (2 * size) == pytest.approx(squared, rel=0.01)


def made(arm, seed, last, steps, *, pool="noisy", reference=0.0):
    return {
        "arm": arm,
        "pool": pool,
        "seed": seed,
        "last": last,
        "mean": last / 2,
        "seconds": {"steps": steps, "reference": reference},
        "rollouts": 10_240,
        "rollouts_reference": 0,
        "clipped": 1.0,
    }


def test_a_comparison_by_hand():
    """Differences are paired by seed; a seed without its plain run is not counted, and references cost seconds."""
    results = [
        *(made("plain", 0, 0.30, 10.0), made("weights", 0, 0.32, 10.0, reference=1.0)),
        *(made("plain", 1, 0.40, 20.0), made("weights", 1, 0.41, 24.0)),
        *(made("weights", 2, 0.90, 1.0), made("plain", 2, 0.10, 1.0, pool="clean")),
    ]
    rows = {(r["pool"], r["arm"]): r for r in compare(results, ["plain", "weights"])}
    told = rows["noisy", "weights"]
    assert told["seeds"] == [0, 1]
    assert told["by seed"] == pytest.approx([0.02, 0.01])
    assert told["last - plain"]["mean"] == pytest.approx(0.015)
    assert told["last - plain"]["half_width"] == pytest.approx(12.7062 * 0.005, rel=1e-4)  # Student, one degree
    assert told["seconds / plain"]["mean"] == pytest.approx((1.1 + 1.2) / 2)
    assert told["ahead"] == 2
    assert set(rows) == {("noisy", "plain"), ("noisy", "weights"), ("clean", "plain")}
    assert "| noisy | weights | 0.365 " in show(list(rows.values()))
    assert np.isfinite(rows["clean", "plain"]["level"]["mean"])
