"""The release of a selected stage to training: at once, or when a person has approved it.

A decision is kept in the store under the key of the selection, so that it is asked for once, whoever asks again. Who
decides does so in Prefect's pages, or by ``influent approve``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.desk import Desk
    from stores.store import Store

WAITING = "waiting.json"
"""In the run directory while a stage waits: its selection, and the flow run that goes on once somebody has decided."""
LOOK_EVERY = 2.0  # seconds between looks for a decision


class Rejected(ValueError):
    """A person has decided that a stage is not trained on."""


def release(desk: Desk, selection: str) -> str:
    """Return the selection once it may be trained on, or exported.

    Raises:
        Rejected: a person said no; the message says who, and why.
    """
    if not desk.config.release.approval:
        return selection
    key = approval_key(desk.store, selection)
    if not desk.store.done(key):
        desk.rest()
        desk.windows.wait(desk, selection)
        (desk.folder / WAITING).unlink(missing_ok=True)
    decision = desk.store.meta(key)
    said = f"by {decision['by']}" + (f": {decision['note']}" if decision["note"] else "")
    if not decision["approved"]:
        raise Rejected(
            f"selection {selection} was rejected {said}; change the settings or the pool for another one; to "
            f"have it decided again: influent retire {desk.folder} {key}, and influent gc {desk.folder} --grace 0"
        )
    desk.reporter.line(f"  approved {said}")
    return selection


def wait_here(desk: Desk, selection: str) -> None:
    """Wait in this process until somebody has decided."""
    announce(desk, selection)
    desk.reporter.line(f"  waiting for approval: influent approve {desk.folder}")
    while not desk.store.done(approval_key(desk.store, selection)):
        time.sleep(LOOK_EVERY)


def announce(desk: Desk, selection: str, **facts: str) -> None:
    """Leave in the run directory what waits, for ``influent approve``."""
    from flows.summary import write_json

    write_json(desk.folder / WAITING, {"selection": selection, **facts})


def waiting(folder: Path) -> dict[str, str]:
    """Return what waits in a run directory.

    Raises:
        FileNotFoundError: nothing does.
    """
    file = folder / WAITING
    if not file.is_file():
        raise FileNotFoundError(f"nothing waits for approval in {str(folder)!r}: 'influent status' says what it holds")
    return dict(json.loads(file.read_text()))


def decide(store: Store, selection: str, *, approved: bool, by: str, note: str = "") -> dict[str, Any]:
    """Keep a decision, and return it.

    Raises:
        ValueError: nobody's name is given.
        Conflict: somebody has decided otherwise.
    """
    if not by.strip():
        raise ValueError("by = '': a decision is somebody's; give a name")
    decision = {"approved": approved, "by": by.strip(), "note": note.strip(), "selection": selection}
    store.record(approval_key(store, selection), "approval", decision)
    return decision


def approval_key(store: Store, selection: str) -> str:
    """Return the key under which the decision on a selection is kept."""
    return store.key("approval", selection=selection)
