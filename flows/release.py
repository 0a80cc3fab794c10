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

WAITING = "waiting"
"""In the run directory: a file for each selection that waits, with the flow run that goes on once somebody decides."""
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
    _place(desk.folder, selection).unlink(missing_ok=True)
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

    _place(desk.folder, selection).parent.mkdir(exist_ok=True)
    write_json(_place(desk.folder, selection), {"selection": selection, **facts})


def waiting(folder: Path, selection: str = "") -> dict[str, str]:
    """Return what waits in a run directory: a selection, or the only one there is.

    Raises:
        FileNotFoundError: nothing does.
        ValueError: several do, and none is named.
    """
    files = sorted((folder / WAITING).glob("*.json"))
    found = [_place(folder, selection)] if selection and _place(folder, selection) in files else files
    if not found or (selection and _place(folder, selection) not in files):
        raise FileNotFoundError(f"nothing waits for approval in {str(folder)!r}: 'influent status' says what it holds")
    if len(found) > 1:
        raise ValueError(
            f"several selections wait in {str(folder)!r}: name one by --selection: {[f.stem for f in files]}"
        )
    return dict(json.loads(found[0].read_text()))


def _place(folder: Path, selection: str) -> Path:
    return folder / WAITING / f"{selection}.json"


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
