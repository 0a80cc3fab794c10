"""The experiment's own arithmetic: what it says of its runs."""

import numpy as np
import pytest

from tests.experiments.diem import compare, show


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
