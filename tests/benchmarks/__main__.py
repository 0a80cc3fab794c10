"""Run the benchmarks: ``python -m tests.benchmarks`` prints a table and writes ``runs/benchmarks.json``."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.embedded.families import example
from pipeline.embedded.warm_start import untrained_policy
from pipeline.features import projection_for, sketch_gradients
from pipeline.generation import Request, Sampling
from pipeline.generation.transformers import TransformersGenerate
from pipeline.gradients import prompt_gradients
from pipeline.policy import collate, token_logps
from pipeline.records import Rollouts
from stores import open_store

PROMPTS, ROLLOUTS, REPEATS = 16, 8, 9


def main() -> None:
    """Time each thing against its floor, alternately, and report the median of the ratios."""
    torch.set_num_threads(1)
    policy = untrained_policy(0)
    rollouts = _rollouts(policy)
    projection = projection_for(policy, 8192)
    batch = collate(rollouts.prompt_ids, rollouts.completion_ids, policy.pad_id)

    def plain() -> None:
        token_logps(policy.model, batch).sum().backward()
        policy.model.zero_grad()

    def loop() -> None:
        for rows in rollouts.groups().values():
            one = rollouts.take(rows)
            token_logps(policy.model, collate(one.prompt_ids, one.completion_ids, policy.pad_id)).sum().backward()
            policy.model.zero_grad()

    results = {
        "one gradient per prompt / plain batched forward and backward": _ratio(
            lambda: prompt_gradients(policy, rollouts, "grpo_sequence", lambda *part, **rows: None), plain
        ),
        "the same, sketched to 8192 / plain": _ratio(
            lambda: sketch_gradients(policy, rollouts, "grpo_sequence", projection), plain
        ),
        "a backward per prompt / plain": _ratio(loop, plain),
        **_stores(rollouts),
    }
    environment = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", "pyarrow", "faiss-cpu", "influent")},
    }
    for name, ratio in results.items():
        print(f"{ratio:8.2f}  {name}")
    Path("runs").mkdir(exist_ok=True)
    Path("runs/benchmarks.json").write_text(
        json.dumps({"ratios": results, "environment": environment}, indent=1) + "\n"
    )


def _stores(rollouts: Rollouts) -> dict[str, float]:
    many = Rollouts.concat([rollouts] * 40).columns()
    table = pa.table({name: list(column) for name, column in many.items()})
    with tempfile.TemporaryDirectory() as folder:
        store, number = open_store(Path(folder) / "store"), iter(range(10**6))
        bare = Path(folder) / "bare.parquet"
        write = _ratio(
            lambda: store.trajectories.write(store.key("rollouts", n=next(number)), many, {}),
            lambda: pq.write_table(table, bare, compression="zstd"),
        )
        key = store.key("rollouts", n=0)
        read = _ratio(lambda: store.trajectories.read([key]), lambda: pq.read_table(bare).to_pydict())
    return {
        "commit 5120 rollouts, checked and fsynced / bare Parquet write of a ready table": write,
        "read them back, verified / bare Parquet read": read,
    }


def _rollouts(policy: object) -> Rollouts:
    rng = np.random.default_rng(0)
    prompts = [example("add", rng)[0] for _ in range(PROMPTS)]
    requests = [Request(p, policy.tokenizer(p).input_ids, ROLLOUTS, 0) for p in prompts]  # type: ignore[attr-defined]
    rows = []
    for group in TransformersGenerate(policy)(requests, Sampling(max_new_tokens=6)):  # type: ignore[arg-type]
        for j, ids in enumerate(group.completion_ids):
            reward = float(j % 2)
            rows.append(
                (group.request.prompt_uid, j, "p", 0, tuple(group.request.prompt_ids), tuple(ids), group.logp[j].tolist(),
                 1.0, group.finish_reason[j], 0, "", reward, "correct" if reward else "incorrect")
            )  # fmt: skip
    return Rollouts(*map(tuple, zip(*rows, strict=True)))


def _ratio(ours: Callable[[], object], floor: Callable[[], object]) -> float:
    ratios = []
    for _ in range(REPEATS):
        ratios.append(_seconds(ours) / _seconds(floor))
    return round(statistics.median(ratios[1:]), 2)


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
