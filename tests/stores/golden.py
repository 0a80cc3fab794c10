"""A small store with one thing of each kind: ``python -m tests.stores.golden FOLDER`` makes it with the code as it is.

A folder a schema version is kept in ``tests/golden/stores``, made by the code of that version, with what was read from
it then in ``contents.json``: later versions must read the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from stores import open_store
from stores.store import Store

NAMES = {"policy": "policy-0", "projection": "sparse-0", "objective": "grpo"}


def fill(store: Store) -> None:
    """Write a shard of rollouts, a generation, a selection, a table and a checkpoint."""
    store.trajectories.write("rollouts-a", _rollouts(0), {"policy": "policy-0"})
    store.trajectories.write("rollouts-b", _rollouts(1), {"policy": "policy-0"})
    rows = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    store.gradients.write("gradients-a", [f"prompt-{i}" for i in range(5)], rows, NAMES)
    selection = {
        "prompt_uid": ["prompt-0", "prompt-1", "prompt-2"],
        "stage": [1, 1, 1],
        "reason": ["selected", "floor", "no_signal"],
        "rank": [0, 1, None],
        "score_influence": [0.5, 0.25, None],
    }
    store.curricula.write("selection-a", selection, {"stage": 1, "size": 2})
    store.tables.write("scores-a", "scores", {"prompt_uid": ["prompt-0"], "valid": [0.5]}, {"targets": ["valid"]})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text('{"model_type": "llama"}')
        store.checkpoints.write("policy-0", Path(folder), {"step": 3})


def contents(store: Store) -> dict[str, Any]:
    """Read all of it back, as JSON-able values."""
    uids, rows, norms = store.gradients.read("gradients-a")
    rollouts = store.trajectories.read(["rollouts-a", "rollouts-b"])
    return {
        "keys": sorted(store.catalog.keys()),
        "rollouts": {name: [_plain(value) for value in values] for name, values in rollouts.items()},
        "gradients": {"uids": uids, "rows": _plain(rows), "norms": _plain(norms)},
        "selection": store.curricula.read("selection-a"),
        "scores": store.tables.read("scores-a"),
        "policy": (store.checkpoints.folder("policy-0") / "config.json").read_text(),
        "meta": {key: store.meta(key) for key in ("policy-0", "selection-a", "gradients-a", "rollouts-a", "scores-a")},
        "beliefs": {
            uid: [list(n) for n in v] for uid, v in store.beliefs.history(["rollouts-b", "rollouts-a"]).items()
        },
    }


def _rollouts(seed: int) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    uids = [f"prompt-{prompt}" for prompt in range(3) for _ in range(2)]
    tokens = [rng.integers(0, 100, rng.integers(1, 5)).tolist() for _ in uids]
    verdicts = rng.choice(["correct", "incorrect", "truncated"], len(uids)).tolist()
    return {
        "prompt_uid": uids,
        "sample": [0, 1] * 3,
        "policy": ["policy-0"] * len(uids),
        "step": [seed] * len(uids),
        "prompt_ids": [[1, 2]] * len(uids),
        "completion_ids": tokens,
        "logp_old": [np.float32(-rng.random(len(row))).tolist() for row in tokens],
        "temperature": [1.0] * len(uids),
        "finish_reason": ["stop"] * len(uids),
        "seed": [seed] * len(uids),
        "text": [f"answer {row} é" for row in tokens],
        "reward": [float(verdict == "correct") for verdict in verdicts],
        "verdict": verdicts,
    }


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


if __name__ == "__main__":
    made = open_store(Path(sys.argv[1]))
    fill(made)
    (Path(sys.argv[1]) / "contents.json").write_text(json.dumps(contents(made), indent=1) + "\n")
