"""Runs whose gradients, scores and weights are made otherwise than by default."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flows.config import Config
from stores import open_store
from tests.flows.tiny import keys_of, quiet, timeless

Settle = Callable[..., Config]
SHORT = {"controls": False, "train": {"stages": (2, 2), "save_every": 1}}


def with_train(**changes: Any) -> dict[str, Any]:
    return SHORT | {"train": SHORT["train"] | changes}


VARIANTS: dict[str, dict[str, Any]] = {
    "directional": {**SHORT, "features": {"dim": 256, "score": "directional"}, "diem": {"way": "scope"}},
    "average": {**with_train(minibatch=2), "diem": {"way": "bookkeeping", "reference": "ema"}},
    "batch": {**with_train(minibatch=2), "diem": {"way": "scope", "reference": "rollout_batch"}},
    "adam": {**SHORT, "features": {"dim": 256, "metric": "adam", "layers": ("*.mlp.*",)}},
    "expected": {**SHORT, "diem": {"reference": "expected_reward"}},
    "factored": {**SHORT, "features": {"dim": 256, "projection": "factored"}},
}


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_run_ends_and_a_second_one_computes_nothing(name: str, settle: Settle, tmp_path: Path):
    """Each combination selects, weights its steps otherwise than by one, and is found whole the second time."""
    config, folder = settle(**VARIANTS[name]), tmp_path / "run"
    summary = quiet(config, folder)
    keys = keys_of(folder)
    told = metrics_of(folder)
    assert len(told) == 4
    assert all("diem_deviation" in line for line in told if line["signal"] and line["stage"] == 1)
    assert any(line.get("diem_deviation", 0) > 1e-6 for line in told)
    assert timeless(json.loads(json.dumps(quiet(config, folder)))) == timeless(json.loads(json.dumps(summary)))
    assert keys_of(folder) == keys


def test_the_moving_average_goes_on_where_it_was(settle: Settle, tmp_path: Path):
    """The average is stored beside the optimizer's moments; a run that lost its last segment makes the same again."""
    config, folder = settle(**VARIANTS["average"]), tmp_path / "run"
    quiet(config, folder)
    store = open_store(folder / "store")
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    policies = [key for key in keys_of(folder) if key.startswith("policy-") and "metrics" in store.meta(key)]
    averages = {}
    for key in policies:
        state = load_file(store.checkpoints.folder(key) / "optimizer.safetensors")
        if "diem/average" in state:
            averages[store.meta(key)["metrics"][-1]["step"]] = state["diem/average"]
    assert sorted(averages) == [1, 2, 3, 4]
    assert not np.allclose(averages[3], averages[4])
    again = copytree(folder, tmp_path / "again")
    assert told == [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]


def test_dot_scores_are_named_so_and_no_gradient_of_the_pool_is_stored(settle: Settle, tmp_path: Path):
    """The selection table has dot products for each validation set, and the store no generation of features."""
    import pyarrow.parquet as pq

    folder = tmp_path / "run"
    quiet(settle(**VARIANTS["directional"]), folder)
    table = pq.read_table(folder / "export" / "selection.parquet")
    assert {"dot_add", "dot_rev"} & set(table.column_names)
    assert not [name for name in table.column_names if name.startswith("cosine_")]
    store = open_store(folder / "store")
    sizes = {len(store.gradients.read(key)[0]) for key in keys_of(folder) if key.startswith("gradients-")}
    assert max(sizes) <= 4  # the four prompts of a validation set: for the weights, in their own space


def test_adams_metric_needs_a_first_stage(settle: Settle):
    """Where the first selection comes before any step there is no second moment, and the file is refused."""
    with pytest.raises(ValueError, match="metric = 'adam' with evidence"):
        settle(features={"metric": "adam"}, evidence={"source": "collect"})
    with pytest.raises(ValueError, match="never sees single coordinates"):
        settle(features={"projection": "factored", "keep": 0.5})
