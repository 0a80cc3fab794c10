"""Steps in a process of their own: the same results, and a limit that really ends them."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.config import Config
from flows.do import doing
from flows.isolation import Isolated, Lost, Overdue
from flows.progress import Reporter
from flows.run import open_desk, plain
from stores.errors import Missing
from tests.flows.tiny import quiet, timeless

LIMITS = {"timeouts": {"train": 200.0, "evaluate": 200.0}}


def _children(pid: int) -> set[int]:
    """The processes below one, at any depth."""
    found, parents = set[int](), {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    while new := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= new
    return found


def _alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes()}


@pytest.mark.timeout(600)
def test_isolated_steps_come_to_the_same(finished: tuple[Path, dict[str, Any]], tiny: Config, tmp_path: Path):
    """A run whose steps have limits comes to what the plain run comes to, and leaves no process behind."""
    before = _children(os.getpid())
    config = Config.model_validate(tiny.model_dump() | LIMITS)
    summary = quiet(config, tmp_path / "run")
    assert timeless(summary) == timeless(finished[1])
    assert not _alive(_children(os.getpid()) - before)


def test_a_step_is_stopped_at_its_limit(settle: Callable[..., Config], tmp_path: Path):
    """A step that takes longer is killed with all that it started; what was committed is kept, and a rerun goes on."""
    slow = settle(train={"stages": (400,), "save_every": 400}, timeouts={"train": 2.0}, controls=False)
    with open_desk(slow, tmp_path / "run", Reporter(quiet=True)) as desk, doing(desk, plain) as do:
        before = _children(os.getpid())
        start = do("start_policy")
        data = do("prompts", start)
        stage = do("shuffle", data, [], 0, budget=8, seed=1)
        steps = {"targets": None, "way": "", "sampler": "shuffle", "first": 0, "stage_start": 0, "total": 400}
        began = time.monotonic()
        seen, stop = set[int](), threading.Event()

        def look() -> None:
            while not stop.wait(0.1):
                seen.update(_children(os.getpid()) - before)

        looking = threading.Thread(target=look)
        looking.start()
        with pytest.raises(Overdue, match=r"timeouts.train = 2 s"):
            do("train", start, data, stage, [], **steps, steps=400)
        stop.set()
        looking.join()
        assert time.monotonic() - began < 60
        assert seen
        time.sleep(0.5)
        assert not _alive(seen)
        assert do("prompts", start) == data, "the next step has another process"
        with pytest.raises(Missing):
            do("evaluate", "policy-0", data, ["test"])


def test_a_process_that_dies_is_named_and_replaced(tiny: Config, tmp_path: Path):
    """A step whose process is killed fails with the signal; asked again, it is done."""
    config = Config.model_validate(tiny.model_dump() | LIMITS)
    with open_desk(config, tmp_path / "run", Reporter(quiet=True)) as desk:
        isolated = Isolated(desk)
        start = isolated.wrap("start_policy", plain)
        prompts = isolated.wrap("prompts", plain)
        key = start()
        assert isolated._process is not None
        os.kill(isolated._process.pid, signal.SIGSTOP)
        killer = threading.Timer(0.5, os.kill, (isolated._process.pid, signal.SIGKILL))
        killer.start()
        with pytest.raises(Lost, match=r"'prompts' was killed by SIGKILL"):
            prompts(key)
        assert desk.store.done(prompts(key))
        isolated.close()


def test_a_limit_of_no_step_is_refused(tiny: Config):
    """A limit names a step, and is above zero."""
    for limits, said in (({"trian": 5.0}, "no step 'trian'"), ({"train": 0.0}, "greater than 0")):
        with pytest.raises(ValueError, match=said):
            Config.model_validate(tiny.model_dump() | {"timeouts": limits})
