"""How time and memory grow: gradients and scores with the prompts, the sketch with the coordinates."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.features import projection_for, sketch_gradients
from pipeline.projection import SparseProjection
from pipeline.records import Rollouts
from stores import open_store
from tests.benchmarks.measure import Row, seconds
from tests.benchmarks.policies import arithmetic, learned

SUBJECT, DIM = "growth", 1024


def measure(small: bool) -> Iterator[Row]:
    """Yield seconds for each size, and the ratio of the last to the first by unit: 1 is linear."""
    counts = (50, 100, 200) if small else (1_000, 10_000, 100_000)
    yield from _growth("featurize prompts", counts, _featurize)
    yield from _growth(f"score prompts x {DIM}", counts if small else (1_000, 10_000, 100_000), _score)
    yield from _growth("project coordinates", (10**5, 10**6) if small else (10**6, 10**7, 10**8), _project)


def _growth(name: str, counts: tuple[int, ...], of: object) -> Iterator[Row]:
    taken = []
    for count in counts:
        taken.append(of(count))  # type: ignore[operator]
        yield Row(SUBJECT, f"{name}: {count:,}", taken[-1], "s")
    yield Row(
        SUBJECT,
        f"{name}: time a unit, largest / smallest",
        taken[-1] / counts[-1] / (taken[0] / counts[0]),
        bar="<= 1.5",
    )


def _featurize(count: int) -> float:
    """Sketch in shards of 64 prompts, as a run does."""
    policy, some = learned(), arithmetic(100, 1)
    projection, groups = projection_for(policy, DIM), list(some.groups().values())
    shard = Rollouts.concat([_renamed(some.take(groups[i % len(groups)]), str(i)) for i in range(64)])
    return seconds(lambda: [sketch_gradients(policy, shard, "grpo", projection) for _ in range(-(-count // 64))])


def _renamed(group: Rollouts, uid: str) -> Rollouts:
    return Rollouts.of({**group.columns(), "prompt_uid": (uid,) * len(group)})


def _score(count: int) -> float:
    rng = np.random.default_rng(0)
    names = {"policy": "p", "projection": "s", "objective": "grpo"}
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder))
        rows = rng.standard_normal((count, DIM), dtype=np.float32)
        key = store.gradients.write(store.key("gradients"), [str(i) for i in range(count)], rows, names)
        store.gradients.search(key, rows[:2])
        return seconds(lambda: store.gradients.search(key, rows[:2]))


def _project(count: int) -> float:
    rows, projection = torch.randn(1, count), SparseProjection(count, 8192)
    projection(rows)
    return seconds(lambda: projection(rows))
