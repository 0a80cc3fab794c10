"""Runs that die: a process that has imported everything and forks a child for each trial.

Reads one JSON request a line, ``{"config", "folder", "log", "after", "commit", "delay"}``, and answers with the child's
wait status and seconds. The child runs the configuration plainly and writes what it computes and commits to ``log``. It
kills itself when the step with that number ends (``after``), when it is about to commit a checkpoint for that time
(``commit``), or is killed after ``delay`` seconds.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "matplotlib.figure",
    *(f"pipeline.{name}" for name in ("decontaminate", "evaluation", "generation.transformers", "report", "training")),
    *(f"stores.{name}" for name in ("bundles", "checkpoints", "curricula", "gradients", "store", "trajectories")),
)
COMPUTED = {
    "pipeline.evaluation": "greedy_accuracy",
    "pipeline.features": "sketch_gradients",
    "pipeline.rollouts": "collect",
    "pipeline.training": "train",
}
"""What costs something; the steps import each of them when they need it."""


def main() -> None:
    """Import all that a run needs, on one thread, and serve requests until the input ends."""
    import torch

    torch.set_num_threads(1)
    for module in WARM:
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_trial(json.loads(line))), flush=True)


def _trial(request: dict[str, Any]) -> dict[str, float]:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _run(request)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    ended, status = 0, 0
    while not ended and request.get("delay") is not None and time.monotonic() - began < request["delay"]:
        time.sleep(0.005)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        if request.get("delay") is not None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"signal": max(0, -code), "code": max(0, code), "seconds": time.monotonic() - began}


def _run(request: dict[str, Any]) -> None:
    from flows.config import load_config
    from tests.flows.tiny import quiet

    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch(log, request.get("commit"))
    ended = 0

    def wrap(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal ended
            result = step(*args, **kwargs)
            ended += 1
            if ended == request.get("after"):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    quiet(load_config(request["config"]), Path(request["folder"]), wrap=wrap)
    os.write(log, f"steps {ended}\n".encode())


def watch(log: int, fatal: int | None) -> None:
    """Log every computation and every commit, and die before the checkpoint with the number ``fatal``."""
    from stores.catalog import Catalog

    def logged(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            os.write(log, f"computed {name}\n".encode())
            return result

        return call

    for module, name in COMPUTED.items():
        found = importlib.import_module(module)
        setattr(found, name, logged(name, getattr(found, name)))
    commit, checkpoints = Catalog.commit, 0

    def committed(self: Any, artifact: Any, *args: Any) -> Any:
        nonlocal checkpoints
        trained = "optimizer.safetensors" in artifact.files
        checkpoints += trained
        if trained and checkpoints == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        result = commit(self, artifact, *args)
        os.write(log, f"committed {artifact.key}\n".encode())
        return result

    Catalog.commit = committed


if __name__ == "__main__":
    main()
