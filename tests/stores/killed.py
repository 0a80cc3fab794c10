"""Writers that die: a process that has imported everything and, for each round, forks writers and kills them.

Reads one JSON request a line, ``{"place", "acknowledged", "writers", "round", "delays"}``, and answers when all writers
are dead. A writer opens the store and commits until it is killed; what was acknowledged to it, it appends to a file.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve requests until the input ends."""
    for module in ("psycopg", "sqlalchemy.dialects.postgresql.psycopg", "stores.beliefs", "stores.catalog"):
        import_module(module)  # a child shall not import

    print("ready", flush=True)
    for line in sys.stdin:
        _round(json.loads(line))
        print("done", flush=True)


def _round(request: dict[str, Any]) -> None:
    children = {}
    for writer, delay in zip(range(request["writers"]), request["delays"], strict=True):
        child = os.fork()
        if child == 0:
            try:
                _write(request, f"r{request['round']}w{writer}")
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(1)
        children[child] = time.monotonic() + delay
    for child, moment in sorted(children.items(), key=lambda item: item[1]):
        time.sleep(max(0.0, moment - time.monotonic()))
        os.kill(child, signal.SIGKILL)
    for child in children:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, "a writer ended by itself"


def _write(request: dict[str, Any], name: str) -> None:
    """Commit artifacts of two files and two counts, and what both writers want, until this process is killed."""
    from stores import open_store

    store = open_store(Path(request["place"][0]), *request["place"][1:])
    log = os.open(request["acknowledged"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = 0
    while True:
        key = f"{name}-{number}"
        for committed in (
            store.record(key, "t", {"n": number}, {"own": key.encode() * 50, "same": b"s" * 999}, counts(key)),
            store.beliefs.apply(f"r{request['round']}-shared-{number}", [("shared", 1, 1)], {}),
        ):
            os.write(log, f"{committed}\n".encode())
        number += 1


def counts(key: str) -> list[tuple[str, int, int]]:
    """The counts that the artifact of a writer has."""
    number = int(key.rsplit("-", 1)[1])
    return [("p", 1, number), (f"q{number}", number, 0)]


if __name__ == "__main__":
    main()
