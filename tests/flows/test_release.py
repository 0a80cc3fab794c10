"""The human gate: a decision is asked for once, kept, and holds."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli import main
from flows.config import Config, to_toml
from flows.curate import curate
from flows.progress import Reporter
from flows.release import WAITING, Rejected, approval_key, decide, waiting
from stores import open_store
from stores.collector import collect
from stores.errors import Conflict

SHORT = {"evidence": {"source": "collect", "rollouts": 4, "validation_rollouts": 4}}


@pytest.fixture
def gated(settle: Callable[..., Config]) -> Config:
    """Settings of a curation that waits for a person."""
    return settle(release={"approval": True}, **SHORT)


def _once_it_waits(folder: Path, then: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        until = time.monotonic() + 200
        while not list((folder / WAITING).glob("*.json")) and time.monotonic() < until:
            time.sleep(0.05)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_stage_waits_for_approval(gated: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A gated curation exports nothing until ``influent approve``; asked again, it does not ask again."""
    folder, seen = tmp_path / "run", []

    def approve() -> None:
        seen.append((folder / "export").exists())
        seen.append(main(["approve", str(folder), "--by", "ann", "--note", "looks right", "--json"]))

    thread = _once_it_waits(folder, approve)
    made = curate(gated, folder, Reporter(quiet=True))
    thread.join()
    assert seen == [False, 0] and json.loads(capsys.readouterr().out)["selection"] == made["selection"]
    assert (folder / "export" / "manifest.json").is_file() and not list((folder / WAITING).iterdir())
    assert curate(gated, folder, Reporter(quiet=True)) == made
    store = open_store(folder / "store")
    decision = store.meta(approval_key(store, made["selection"]))
    assert decision == {"approved": True, "by": "ann", "note": "looks right", "selection": made["selection"]}


def test_a_rejected_stage_stops_the_run(gated: Config, tmp_path: Path):
    """A rejection names who and why, holds for a rerun, and is decided again only once it is retired and collected."""
    folder = tmp_path / "run"
    thread = _once_it_waits(folder, lambda: main(["approve", str(folder), "--by", "bob", "--note", "odd", "--reject"]))
    with pytest.raises(Rejected, match="by bob: odd"):
        curate(gated, folder, Reporter(quiet=True))
    thread.join()
    with pytest.raises(Rejected, match="influent retire"):
        curate(gated, folder, Reporter(quiet=True))
    store = open_store(folder / "store")
    selection = store.catalog.keys("selection")[0]
    with pytest.raises(Conflict):
        decide(store, selection, approved=True, by="ann")
    store.catalog.retire(approval_key(store, selection))
    collect(store, 0)
    assert decide(store, selection, approved=True, by="ann")["approved"]
    assert curate(gated, folder, Reporter(quiet=True))["selection"] == selection


def test_nothing_to_decide_is_said(tiny: Config, tmp_path: Path):
    """Where nothing waits, or nobody decides, the error names the directory, and what is missing."""
    with pytest.raises(FileNotFoundError, match="nothing waits"):
        waiting(tmp_path)
    (tmp_path / "config.toml").write_text(to_toml(tiny))
    (tmp_path / WAITING).mkdir()
    for name in ("selection-1", "selection-2"):
        (tmp_path / WAITING / f"{name}.json").write_text(json.dumps({"selection": name}))
    assert waiting(tmp_path, "selection-2") == {"selection": "selection-2"}
    with pytest.raises(ValueError, match="--selection"):
        waiting(tmp_path)
    with pytest.raises(ValueError, match="give a name"):
        decide(open_store(tmp_path / "store"), "selection-0", approved=True, by=" ")
