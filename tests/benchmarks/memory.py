"""Peak memory of sketching one prompt's gradient, beside plain training on that prompt, each in a process of its own.

The peak is the kernel's (VmHWM of /proc/self/status), which sees every allocator; a process's peak is never reset, hence
the processes.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.measure import Row

SUBJECT = "memory"


def measure(small: bool) -> Iterator[Row]:
    """Yield the peaks above the loaded model, and their difference."""
    layers = 2 if small else 30
    peak = {what: _peak_of(what, layers) for what in ("plain", "sketch")}
    what = f"one prompt of 128 tokens, SmolLM2's width, {layers} layers"
    yield Row(SUBJECT, f"plain forward and backward above the model, {what}", peak["plain"][0], "MiB")
    yield Row(SUBJECT, f"its sketched gradient above the model, {what}", peak["sketch"][0], "MiB")
    allowed = peak["sketch"][1]
    yield Row(SUBJECT, "sketch - plain", peak["sketch"][0] - peak["plain"][0], "MiB", f"<= {allowed:.0f}",
              "bar: the largest parameter and the sketch")  # fmt: skip


def _peak_of(what: str, layers: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "tests.benchmarks.memory", what, str(layers)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(lines[-2]), float(lines[-1])


def _run(what: str, layers: int) -> None:
    """Do one of the two, and print its peak above the loaded model and what the bar allows, in MiB."""
    import torch

    from pipeline.features import projection_for, sketch_gradients
    from pipeline.weighted import plain
    from tests.benchmarks.policies import SMOLLM2, llama, random_rollouts

    torch.set_num_threads(1)
    policy = llama({**SMOLLM2, "num_hidden_layers": layers})
    rollouts = random_rollouts(49152, 1, 32, 2, 48)
    projection = projection_for(policy, 8192)
    before = _status("VmRSS")
    if what == "plain":
        plain(policy, rollouts, "grpo", micro_tokens=1 << 16)
    else:
        sketch_gradients(policy, rollouts, "grpo", projection)
    largest = max(p.numel() for p in policy.trainable().values())
    print(_status("VmHWM") - before, (largest + projection.zeros(1).numel()) * 4 / 2**20)


def _status(name: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    _run(sys.argv[1], int(sys.argv[2]))
