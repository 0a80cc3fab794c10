"""From stored gradients to a stage at 1e4 to 1e7 prompts, each step in a process of its own: seconds, memory, disk.

``python -m tests.benchmarks.scale [--small] [--price DOLLARS] [--docs]`` writes ``runs/scale.json``; ``--docs`` puts
the tables and the picture into SCALE.md and docs/scale.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # read when the libraries load: hence the imports inside functions

PROMPTS, SMALL = (10**4, 10**5, 10**6, 10**7), (500,)
STORED = 10**6  # pools up to this size have rollouts too, so that the cascade is measured
DIM = 256
ORDER = ("write gradients", "write evidence", "cascade", "score", "select", "read the stage")


def main() -> None:
    """Measure, print each row as it is known, write JSON and, when asked for, the page."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale", description=__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes: whether it runs, not how fast")
    parser.add_argument("--dim", type=int, default=DIM, help="numbers a gradient; the disk must hold 2 bytes of each")
    parser.add_argument("--largest", type=int, default=PROMPTS[-1], help="prompts of the largest pool")
    parser.add_argument("--price", type=float, default=2.0, help="dollars an hour of one accelerator, an assumption")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the pools are made, and removed")
    parser.add_argument("--out", type=Path, default=Path("runs/scale.json"))
    parser.add_argument("--docs", action="store_true", help="write SCALE.md's tables and docs/scale.svg")
    given = parser.parse_args()
    from tests.benchmarks import shards

    counts = SMALL if given.small else [n for n in PROMPTS if n <= given.largest]
    made = shards.measure(given.small)
    rows = list(measure(counts, given.dim, given.folder))
    from tests.benchmarks.measure import environment  # loads torch, whose memory a new process would begin with

    result = {
        "small": given.small,
        "dim": given.dim,
        "rows": rows,
        "shards": made,
        "extrapolated": shards.extrapolate(made, given.price),
        "price": given.price,
        "environment": environment(),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    if given.docs:
        from tests.benchmarks.scale_page import write

        write(result)


def measure(counts: list[int] | tuple[int, ...], dim: int, place: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each step at each size: seconds, the process's largest resident memory, bytes written."""
    from tests.benchmarks import pool

    place.mkdir(parents=True, exist_ok=True)
    for count in counts:
        needed, free = pool.needs(count, dim, count <= STORED), shutil.disk_usage(place).free
        print(f"{count:,} prompts x {dim}: up to {needed / 1e9:.2f} GB of {free / 1e9:.0f} GB free in {place}")
        if needed > 0.8 * free:
            raise SystemExit(f"{place} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed: name another")
        with tempfile.TemporaryDirectory(dir=place) as name:
            folder, state = Path(name), dict[str, Any]()
            for step in ORDER:
                if step == "cascade" and count > STORED:
                    continue
                yield _row(step, count, dim, folder, state)


def _row(step: str, count: int, dim: int, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    from tests.benchmarks import pool

    before = dict(pool.sizes(folder))
    with ProcessPoolExecutor(1, get_context("spawn")) as process:  # of its own: its largest memory is that of the step
        found, measured = process.submit(_run, step, count, dim, folder, state).result()
    state |= found
    written = {name: size - before[name] for name, size in pool.sizes(folder)}
    row = {"step": step, "prompts": count, **measured, **written}
    disk, memory = sum(written.values()) / 1e9, row["memory"] / 2**30
    print(f"  {step:16} {row['seconds']:9.2f} s, of the processor {row['processor']:9.2f} s, {memory:6.2f} GiB, {disk:7.3f} GB",
          flush=True)  # fmt: skip
    return row


def _run(
    step: str, count: int, dim: int, folder: Path, state: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, float]]:
    import faiss

    from tests.benchmarks import pool

    faiss.omp_set_num_threads(1)
    desk, call = pool.desk(folder), STEPS[step]  # opened, and its libraries loaded, before the clock starts
    began, used = time.perf_counter(), time.process_time()
    found = call(desk, count, dim, state)
    measured = {"seconds": time.perf_counter() - began, "processor": time.process_time() - used}
    return found, measured | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def _gradients(desk: Any, count: int, dim: int, state: dict[str, Any]) -> dict[str, Any]:
    from tests.benchmarks import pool

    return {"data": pool.write_prompts(desk.store, count), "pool": pool.write_gradients(desk.store, count, dim)}


def _evidence(desk: Any, count: int, dim: int, state: dict[str, Any]) -> dict[str, Any]:
    from tests.benchmarks import pool

    return {"rollouts": pool.write_evidence(desk.store, count, count <= STORED)}


def _cascade(desk: Any, count: int, dim: int, state: dict[str, Any]) -> dict[str, Any]:
    from flows import evidence
    from tests.benchmarks import pool

    found = evidence.cascade(desk, state["data"], state["rollouts"])
    assert (found.reason == pool.reasons(count)).all()
    return {}


def _score(desk: Any, count: int, dim: int, state: dict[str, Any]) -> dict[str, Any]:
    from flows.gradients import score
    from tests.benchmarks import pool

    return {"scores": score(desk, state["pool"], pool.targets(desk.store))}


def _select(desk: Any, count: int, dim: int, state: dict[str, Any]) -> dict[str, Any]:
    from flows.steps import select
    from tests.benchmarks import pool

    key = select(desk, state["data"], state["rollouts"], pool.reasons(count), state["scores"], 1)
    return {"selection": key}


def _stage(desk: Any, count: int, dim: int, state: dict[str, Any]) -> dict[str, Any]:
    from flows import selections

    table = selections.stage(desk, state["selection"])
    assert len(table["prompt_uid"]) == max(1, int(desk.config.select.share * count))
    assert table["drawn"].count("influence") > 0
    return {}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "write gradients": _gradients,
    "write evidence": _evidence,
    "cascade": _cascade,
    "score": _score,
    "select": _select,
    "read the stage": _stage,
}


if __name__ == "__main__":
    main()
