"""A pool of any size with made-up gradients, rollouts and beliefs, in a real store, written shard by shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flows.config import Config, load_config
from flows.desk import Desk
from flows.progress import Reporter
from pipeline.curriculum import CODE, NONE
from stores import open_store
from stores.store import Store

SHARD = 16_384
ROLLOUTS = 8
TOKENS = 4  # of a made-up completion
SETS = {"one": 64, "two": 64}
SILENT = 10  # every so many prompts has no signal, hence no gradient
NAMES = {"policy": "p", "projection": "s", "objective": "grpo"}
BYTES = {"counts": 260, "scores": 60, "selection": 100, "rollout": 60}
"""Rough bytes a row, from above, to ask for before anything is written."""


def config(shard: int = SHARD) -> Config:
    """Return settings for a large pool: rollouts collected beforehand, large shards, a stage of a tenth."""
    made = load_config("embedded").model_dump()
    made["evidence"] |= {"source": "collect", "shard": shard}
    return Config.model_validate(made)


def desk(folder: Path) -> Desk:
    """Open the store of a folder at a desk that scores and selects; it has no verifiers."""
    return Desk(config(), folder, open_store(folder / "store"), None, Reporter(quiet=True))  # type: ignore[arg-type]


def needs(prompts: int, dim: int, stored: bool) -> int:
    """Return about how many bytes of disk a pool takes."""
    rollouts = BYTES["rollout"] * ROLLOUTS if stored else 0
    return prompts * (2 * dim + 80 + BYTES["counts"] + BYTES["scores"] + BYTES["selection"] + rollouts)


def uids(prompts: int, seed: int = 0) -> pa.Array:
    """Return ids of 32 hexadecimal digits."""
    digits = np.frombuffer(np.random.default_rng(seed).bytes(16 * prompts).hex().encode(), np.uint8)
    offsets = pa.array(np.arange(prompts + 1, dtype=np.int32) * 32)
    return pa.StringArray.from_buffers(prompts, offsets.buffers()[1], pa.py_buffer(digits))


def has_gradient(prompts: int) -> np.ndarray:
    """Return which prompts have a signal."""
    return np.arange(prompts) % SILENT > 0


def write_prompts(store: Store, prompts: int) -> str:
    """Write the pool, all its prompts with one short text."""
    same = {"split": "pool", "reason": "", "messages": '[{"content":"1+1=","role":"user"}]'}
    columns = {"prompt_uid": uids(prompts), **{name: pa.repeat(text, prompts) for name, text in same.items()}}
    return store.tables.write(store.key("prompts", n=prompts), "prompts", columns, {})


def write_gradients(store: Store, prompts: int, dim: int) -> list[str]:
    """Write the gradients of all prompts with a signal, and of two validation sets; return the keys of the pool's."""
    named, keys = uids(prompts).filter(pa.array(has_gradient(prompts))), []
    for start in range(0, len(named), SHARD):
        part = named.slice(start, SHARD).to_pylist()
        rows = np.random.default_rng(start).standard_normal((len(part), dim), dtype=np.float32)
        rows[:, 0] += np.random.default_rng(start + 1).standard_normal(len(part), dtype=np.float32) * dim**0.5 / 8
        keys.append(store.gradients.write(store.key("gradients", n=start), part, rows, NAMES))
    for number, (name, size) in enumerate(SETS.items()):
        rows = np.random.default_rng(number).standard_normal((size, dim), dtype=np.float32)
        rows[:, 0] += dim**0.5
        store.gradients.write(_aim(store, name), [f"{name}-{i}" for i in range(size)], rows, NAMES)
    return keys


def targets(store: Store) -> dict[str, tuple[list[str], int]]:
    """Return the validation sets as ``flows.gradients.score`` takes them."""
    return {name: ([_aim(store, name)], size) for name, size in SETS.items()}


def write_evidence(store: Store, prompts: int, stored: bool) -> list[str]:
    """Write what a collection leaves: counts of successes and failures, and, where asked for, the rollouts too."""
    named, keys = uids(prompts), []
    for start in range(0, prompts, SHARD):
        part = named.slice(start, SHARD).to_pylist()
        rewards = _rewards(start, len(part))
        key = store.key("rollouts", n=start)
        if stored:
            parts = (_rollouts(part[i : i + 256], rewards[i : i + 256]) for i in range(0, len(part), 256))
            keys.append(store.trajectories.write_all(key, parts, {"rollouts": rewards.size}))
        else:
            good = rewards.sum(axis=1).tolist()
            counts = [(uid, n, ROLLOUTS - n) for uid, n in zip(part, good, strict=True)]
            keys.append(store.beliefs.apply(key, counts, {}))
    return keys


def reasons(prompts: int) -> np.ndarray:
    """Return the numbers of the reasons, as the cascade would: no signal, or none."""
    return np.where(has_gradient(prompts), NONE, CODE["no_signal"]).astype(np.int8)


def _aim(store: Store, name: str) -> str:
    return store.key("gradients", validation=name)


def _rewards(start: int, count: int) -> np.ndarray:
    """Return rewards of 0 and 1 (prompts, rollouts): all alike where there is no signal, and nowhere else."""
    rng = np.random.default_rng(start)
    made = (rng.random((count, ROLLOUTS)) < rng.random((count, 1))).astype(int)
    made[:, 0], made[:, 1] = 0, 1
    made[~has_gradient(start + count)[start:]] = 0
    return made


def _rollouts(named: list[str], rewards: np.ndarray) -> dict[str, Any]:
    n, flat = rewards.size, rewards.ravel().tolist()
    ids = np.zeros(TOKENS, np.int32)
    return {
        "prompt_uid": [uid for uid in named for _ in range(ROLLOUTS)],
        "sample": list(range(ROLLOUTS)) * len(named),
        "policy": ["p"] * n,
        "step": [0] * n,
        "prompt_ids": [ids] * n,
        "completion_ids": [ids] * n,
        "logp_old": [ids.astype(np.float32)] * n,
        "temperature": [1.0] * n,
        "finish_reason": ["stop"] * n,
        "seed": [0] * n,
        "text": [""] * n,
        "reward": [float(reward) for reward in flat],
        "verdict": ["correct" if reward else "incorrect" for reward in flat],
    }


def sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield what a folder holds: objects and catalog, in bytes."""
    for name, pattern in (("objects", "store/objects/*/*"), ("catalog", "store/catalog.sqlite*")):
        yield name, sum(path.stat().st_size for path in folder.glob(pattern))
