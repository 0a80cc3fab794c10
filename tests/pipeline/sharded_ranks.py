"""What each of the two processes of ``test_sharded`` runs: every case of a file, its sketches written beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from pipeline import packing
from pipeline.features import projection_for
from pipeline.fsdp import join_group, leave_group, load_sharded
from pipeline.records import Rollouts
from pipeline.scope import named
from pipeline.sharded import sketch_gradients


def main(folder: Path) -> None:
    """Take the cases one after another in one process group."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    device = join_group("cpu", rank, 2)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        packing.ROW_TOKENS = case["row_tokens"]
        case["load"]["adapter"] = case["load"].get("adapter") and Path(case["load"]["adapter"])
        policy = load_sharded(case["checkpoint"], device=device, **case["load"])
        scope = named(policy.model, case["layers"]) if case["layers"] else None
        projection = projection_for(policy, scope=scope, **case["projection"])
        seen: dict[str, list[float]] = {}

        def watch(group: Rollouts, logps: np.ndarray, seen: dict[str, list[float]] = seen) -> None:
            for uid, sample, row in zip(group.prompt_uid, group.sample, logps, strict=True):
                seen[f"{uid}/{sample}"] = row.tolist()

        for number, columns in enumerate(case["rollouts"]):
            seen.clear()
            rollouts = Rollouts(**{key: tuple(column) for key, column in columns.items()})
            uids, rows = sketch_gradients(
                policy,
                rollouts,
                case["objective"],
                projection,
                micro_tokens=case["micro_tokens"],
                scope=scope,
                watch=watch,
            )
            held = sum(p.to_local().numel() for p in policy.model.parameters())
            facts = {
                "uids": uids,
                "seen": dict(seen),
                "held": held,
                "trainable": len(policy.trainable()),
                "identity": json.dumps(projection.identity),
            }
            np.save(folder / f"{name}-{number}-{rank}.npy", rows)
            (folder / f"{name}-{number}-{rank}.json").write_text(json.dumps(facts))
    leave_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
