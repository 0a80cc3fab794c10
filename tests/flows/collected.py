"""Collections that die: collects the pool of a configuration, once a run directory, logging what is asked for.

Reads one JSON argument, ``{"config", "runs": [{"folder", "log", "after"}]}``. Where ``after`` is given, the process is
killed by SIGKILL as soon as that many groups are finished.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Collect as the argument says."""
    import torch

    torch.set_num_threads(1)
    request = json.loads(sys.argv[1])
    for run in request["runs"]:
        _collect(request["config"], **run)


def _collect(config: str, folder: str, log: str, after: int = 0) -> None:
    import pipeline.rollouts
    from flows import collecting, prepare
    from flows.config import load_config
    from flows.progress import Reporter
    from flows.run import open_desk
    from stores.spool import Spool

    collect, add, finished = pipeline.rollouts.collect, Spool.add, 0

    def asked(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        with Path(log).open("a") as file:
            file.writelines(f"asked {uid}\n" for uid in prompts.prompt_uid)
        return collect(prompts, *args, **kwargs)

    def added(self: Any, key: str, name: str, columns: Any) -> None:
        nonlocal finished
        add(self, key, name, columns)
        with Path(log).open("a") as file:
            file.write(f"finished {name}\n")
        finished += 1
        if finished == after:
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.rollouts.collect, Spool.add = asked, added
    try:
        with open_desk(load_config(config), Path(folder), Reporter(quiet=True)) as desk:
            start = prepare.start_policy(desk)
            data = prepare.prompts(desk, start)
            collecting.collect(desk, start, data, "pool", rollouts=3, seed=1)
    finally:
        pipeline.rollouts.collect, Spool.add = collect, add


if __name__ == "__main__":
    main()
