"""Run the benchmarks: ``python -m tests.benchmarks [SUBJECT ...] [--small]`` prints a table and writes it as JSON."""

from __future__ import annotations

import argparse
import json
import os
from importlib import import_module
from pathlib import Path

SUBJECTS = ("sketch", "capture", "memory", "directional", "diem", "scoring", "stores", "generation")
SLOW = ("growth",)  # only when asked for


def main() -> None:
    """Measure one subject after the other, each row printed as it is known."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"some of {', '.join((*SUBJECTS, *SLOW))}")
    parser.add_argument("--small", action="store_true", help="small sizes: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks.json"))
    given = parser.parse_args()
    unknown = set(given.subjects) - {*SUBJECTS, *SLOW}
    if unknown:
        parser.error(f"no such subject: {', '.join(sorted(unknown))}; there are {', '.join((*SUBJECTS, *SLOW))}")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # read when the libraries load: hence the imports below
    import torch

    from tests.benchmarks.measure import environment

    torch.set_num_threads(1)
    rows = []
    for subject in given.subjects or SUBJECTS:
        for row in import_module(f"tests.benchmarks.{subject}").measure(given.small):
            print(row.line(), flush=True)
            rows.append(row.record())
    given.out.parent.mkdir(parents=True, exist_ok=True)
    written = {"small": given.small, "rows": rows, "environment": environment()}
    given.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
