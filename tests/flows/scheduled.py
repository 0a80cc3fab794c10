"""A curation as a worker runs it that dies on request: what it computes and commits goes to a log.

``after`` counts steps: when that many have ended in this process, the worker and this process are killed, as by a
machine that loses power. ``server`` is the process of a Prefect server that is killed instead, and the run goes on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow

from flows import deployments
from tests.flows.killed import watch


@flow(name="fragile", persist_result=False)
def fragile(config: str, directory: str, log: str, after: int = 0, server: int = 0) -> Any:
    """Curate, and die after a step."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch(descriptor, None)
    tasks, ended = deployments.tasks, 0

    def mortal(settings: Any) -> Callable[..., Any]:
        wrap = tasks(settings)

        def wrapped(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
            task = wrap(name, step)

            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal ended
                result = task(*args, **kwargs)
                ended += 1
                if ended == after and server:
                    os.kill(server, signal.SIGKILL)
                elif ended == after:
                    os.kill(os.getppid(), signal.SIGKILL)
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        return wrapped

    deployments.tasks = mortal
    result = deployments.curate.fn(config=config, directory=directory)
    os.write(descriptor, f"steps {ended}\n".encode())
    Path(log).with_suffix(".done").touch()
    return result
