"""How fast a device is, measured in a second, or assumed where it is not at hand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from pipeline.costs import Rate

SECONDS = 0.2  # of each measurement
ROWS = 1024  # tokens in the product that is timed
GIVEN = 0.4  # share of a GPU's peak that large-model training reaches (PaLM, arXiv:2204.02311: 46 % of its own)
ASSUMED = {"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12}  # an A100's data sheet, dense
ASSUMED_BANDWIDTH = 2.0e12
ASSUMED_CALL = 1e-5  # a kernel launch from Python


def rate_of(device: str, dtype: str, hidden: int, tflops: float = 0.0) -> Rate:
    """Return a device's rate.

    Args:
        device: torch device.
        dtype: of the weights.
        hidden: width of the policy: narrow products are slower.
        tflops: operations [1e12 a second] that the device reaches, in the place of what is measured or assumed.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # what torch raises for a device that is not there, by its build
        found = Rate(
            GIVEN * ASSUMED[dtype],
            ASSUMED_BANDWIDTH,
            ASSUMED_CALL,
            f"assumed, as {device!r} is not at hand: an A100 at {GIVEN:.0%} of its peak",
        )
    else:
        found = _measured(device, getattr(torch, dtype), hidden)
    if tflops:
        return Rate(tflops * 1e12, found.bandwidth, found.call, f"{tflops:g} TFLOP/s as given; the rest {found.source}")
    return found


def memory_of(device: str) -> float:
    """Return the bytes of memory that a device has; 0 where it is not at hand."""
    if device.startswith("cuda"):
        return float(torch.cuda.get_device_properties(device).total_memory) if torch.cuda.is_available() else 0.0
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if device == "cpu" else 0.0


@torch.inference_mode()
def _measured(device: str, dtype: torch.dtype, hidden: int) -> Rate:
    a, b = (torch.ones(*size, device=device, dtype=dtype) for size in ((ROWS, hidden), (hidden, 4 * hidden)))
    big = torch.ones(1 << 24, device=device)
    small, weight = torch.ones(1, 16, device=device), torch.ones(16, 16, device=device)
    product = _time(lambda: a @ b, device)
    copy = _time(big.clone, device)
    return Rate(
        flops=2.0 * ROWS * hidden * 4 * hidden / product,
        bandwidth=2.0 * big.numel() * big.element_size() / copy,
        call=_time(lambda: torch.nn.functional.linear(small, weight), device),
        source=f"measured on {device!r}, {str(dtype).removeprefix('torch.')}",
    )


def _time(run: Callable[[], object], device: str) -> float:
    """Return the seconds of one call, from as many as fit into ``SECONDS``."""

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    run()
    wait()
    began, calls = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        for _ in range(8):
            run()
        wait()
        calls += 8
    return (time.perf_counter() - began) / calls
