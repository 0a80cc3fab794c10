"""A desk for a process that helps another one: the same settings and store, under the lease of the one that asks.

What is lent is JSON, so it can go to another machine. Once the lease is overtaken, the helper commits nothing.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.config import Config, to_toml
from flows.desk import Desk
from flows.progress import Reporter
from stores.entries import Lease


def end_with_parent(end: Callable[[], object]) -> None:
    """Call ``end``, also in the middle of a step, as soon as the process that started this one is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        end()

    threading.Thread(target=watch, daemon=True).start()


def how_it_ended(code: int) -> str:
    """Say what the exit code of a process tells."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def lend(desk: Desk) -> dict[str, Any]:
    """Return what ``borrow`` needs to open a desk like this one."""
    lease = desk.store.lease
    return {
        "settings": to_toml(desk.config),
        "folder": str(desk.folder.absolute()),
        "current": str(Path.cwd()),
        "lease": asdict(lease) if lease else None,
        "origin": desk.store.origin,
    }


@contextmanager
def borrow(lent: Mapping[str, Any], reporter: Reporter) -> Iterator[Desk]:
    """Open a desk like the one that was lent, with a store, verifiers and engines of its own."""
    import torch

    from pipeline.rewards import VerifierPool
    from stores import open_store

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if Path(lent["current"]).is_dir():  # settings may name places from where the run was started
        os.chdir(lent["current"])
    config, folder = Config.model_validate(tomllib.loads(lent["settings"])), Path(lent["folder"])
    if config.policy.threads:
        torch.set_num_threads(config.policy.threads)
    folder.mkdir(parents=True, exist_ok=True)
    store = open_store(folder / "store", config.catalog or None, config.objects or None)
    store.lease, store.origin = Lease(**lent["lease"]) if lent["lease"] else None, lent["origin"]
    with VerifierPool(config.verifiers.processes, config.verifiers.timeout) as verifiers:
        desk = Desk(config, folder, store, verifiers, reporter)
        try:
            yield desk
        finally:
            desk.engines.close()
