"""A shard of rollouts and one of gradients, measured on two policies, and what a whole pool takes by them.

Beside the measured seconds stand those of ``pipeline.costs``, which also give the hours on an accelerator.
"""

from __future__ import annotations

import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipeline.costs import Rate, Shape, generation, gradients

DIM, ROLLOUTS = 1024, 8
POOLS = (10**4, 10**5, 10**6, 10**7, 10**9)
POLICIES = {  # prompts of a shard, tokens of a prompt and of a completion
    "embedded, 335 k parameters": (64, 8, 6),
    "SmolLM2-135M's shape": (2, 64, 24),
}
MICRO = 8192
TARGET = Shape(
    parameters=1_562_179_072,  # with the adapter
    trainable=18_464_768,
    multiplied=1_562_179_072,
    layers=28,
    hidden=1536,
    heads=12,
    kv_width=256,
    vocabulary=151_936,
    itemsize=2,
)
"""The shape of Qwen2.5-1.5B with LoRA of rank 16 on all linear layers."""
TARGET_TOKENS = (128, 512)  # of a prompt, of a completion


def measure(small: bool) -> list[dict[str, Any]]:
    """Return for each policy and step: seconds, memory and bytes of a measured shard, and the seconds of the formula."""
    rows = []
    for name, sizes in list(POLICIES.items())[: 1 if small else 2]:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            rows += process.submit(_shard, name, (4, *sizes[1:]) if small else sizes).result()
        for row in rows[-2:]:
            print(f"  {name}: {row['step']} {row['processor'] / row['prompts']:.4f} s of the processor a prompt, by the "
                  f"formula {row['formula'] / row['prompts']:.4f}", flush=True)  # fmt: skip
    return rows


def extrapolate(rows: list[dict[str, Any]], price: float) -> list[dict[str, Any]]:
    """Return hours of a pool of each size: of a core by the shards, of an assumed accelerator by the formulas."""
    found = []
    for count in POOLS:
        for row in rows:
            each = row["processor"] / row["prompts"]
            found.append({"policy": row["policy"], "step": row["step"], "prompts": count, "hours": each * count / 3600,
                          "disk": row["disk"] / row["prompts"] * count})  # fmt: skip
        for step, cost in _target(count).items():
            hours = cost.seconds / 3600
            found.append({"policy": "Qwen2.5-1.5B's shape", "step": step, "prompts": count, "hours": hours,
                          "dollars": hours * price, "disk": cost.disk or 2.0 * DIM * count})  # fmt: skip
    return found


def accelerator() -> Rate:
    """Return the accelerator of the extrapolation: an A100 by its data sheet, at the share that the dry run assumes."""
    from pipeline.throughput import ASSUMED, ASSUMED_BANDWIDTH, ASSUMED_CALL, GIVEN

    return Rate(GIVEN * ASSUMED["bfloat16"], ASSUMED_BANDWIDTH, ASSUMED_CALL, f"an A100 at {GIVEN:.0%} of its peak")


def _target(count: int) -> dict[str, Any]:
    asked, said = TARGET_TOKENS
    tokens = {"prompts": count, "prompt_tokens": asked, "rollouts": ROLLOUTS, "new_tokens": said}
    return {
        "collect": generation(TARGET, accelerator(), **tokens, batch_tokens=1 << 18),
        "featurize": gradients(TARGET, accelerator(), **tokens, micro_tokens=1 << 16),
    }


def _shard(name: str, sizes: tuple[int, int, int]) -> list[dict[str, Any]]:
    import numpy as np
    import torch

    from pipeline.costs import shape_of
    from pipeline.embedded.warm_start import untrained_policy
    from pipeline.features import projection_for, sketch_gradients
    from pipeline.generation import Request, Sampling
    from pipeline.generation.transformers import TransformersGenerate
    from pipeline.policy import Policy
    from pipeline.throughput import rate_of
    from stores import open_store
    from tests.benchmarks.policies import SMOLLM2, llama, rollouts_of

    torch.set_num_threads(1)
    policy = untrained_policy(0)
    if not name.startswith("embedded"):
        policy = Policy(llama(SMOLLM2).model, policy.tokenizer, context=256)
    prompts, asked, said = sizes
    rng = np.random.default_rng(0)
    ids = [tuple(rng.integers(2, 27, asked).tolist()) for _ in range(prompts)]
    requests, engine = [Request(str(i), row, ROLLOUTS, 0) for i, row in enumerate(ids)], TransformersGenerate(policy)
    projection = projection_for(policy, DIM)
    list(engine(requests[:1], Sampling(max_new_tokens=2)))  # its first call makes things that stay
    shape, tokens = shape_of(policy.model), {"prompts": prompts, "prompt_tokens": asked, "rollouts": ROLLOUTS}
    rate, rows = rate_of("cpu", "float32", shape.hidden), []
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder))

        def collect() -> Any:
            groups = {g.request.prompt_uid: g.completion_ids for g in engine(requests, Sampling(max_new_tokens=said))}
            made = rollouts_of([list(row) for row in ids], [groups[str(i)] for i in range(prompts)])
            store.trajectories.write(store.key("rollouts"), made.columns(), {})
            return made

        made, row = _timed(collect, folder)
        new = float(np.mean([len(tokens) for tokens in made.completion_ids]))
        formula = generation(shape, rate, **tokens, new_tokens=new, batch_tokens=1 << 16)
        rows.append({"policy": name, "step": "collect", "prompts": prompts, "formula": formula.seconds, **row})

        def featurize() -> Any:
            uids, found = sketch_gradients(policy, made, "grpo", projection, micro_tokens=MICRO)
            facts = {"policy": "p", "projection": "s", "objective": "grpo"}
            return store.gradients.write(store.key("gradients"), uids, found, facts)

        _, row = _timed(featurize, folder)
        formula = gradients(shape, rate, **tokens, new_tokens=new, micro_tokens=MICRO)
        rows.append({"policy": name, "step": "featurize", "prompts": prompts, "formula": formula.seconds, **row})
    return [row | {"shape": asdict(shape), "rate": asdict(rate), "tokens": [asked, new]} for row in rows]


def _timed(call: Any, folder: str) -> tuple[Any, dict[str, float]]:
    before = _objects(folder)
    began, used = time.perf_counter(), time.process_time()
    found = call()
    return found, {
        "seconds": time.perf_counter() - began,
        "processor": time.process_time() - used,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "disk": _objects(folder) - before,
    }


def _objects(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("objects/*/*"))
