"""Leases: one holder at a time, and whoever lost it commits nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stores import Fenced, open_store
from stores.leases import this_process
from stores.store import Store

ROOT = Path(__file__).parents[2]
Place = tuple[Path, str | None, str | None]


def test_a_lease_has_one_holder(store: Store) -> None:
    """While one holds a lease another is refused, with who and for how long; once given back it is free."""
    lease = store.leases.acquire("run", 60.0)
    assert (lease.name, lease.owner, lease.fence) == ("run", this_process(), 1)
    with pytest.raises(Fenced, match=rf"'run' is held by {this_process()} for another \d+ s"):
        store.leases.acquire("run", 60.0)
    store.leases.acquire("another run", 60.0)
    store.leases.release(lease)
    assert store.leases.acquire("run", 60.0).fence == 2


def test_an_expired_lease_is_taken_over_and_the_old_holder_is_fenced(store: Store) -> None:
    """A holder that was overtaken can neither renew, nor give back what is not its own, nor commit."""
    old = store.leases.acquire("run", 0.01)
    time.sleep(0.02)
    new = store.leases.acquire("run", 60.0)
    with pytest.raises(Fenced, match="was taken over by"):
        store.leases.renew(old, 60.0)
    store.leases.release(old)
    with pytest.raises(Fenced):
        store.leases.acquire("run", 60.0)
    store.lease = old
    with pytest.raises(Fenced, match="nothing is committed"):
        store.record("key", "t", {}, {"f": b"x"}, [("p", 1, 0)])
    assert not store.done("key")
    store.lease = new
    store.record("key", "t", {}, {"f": b"x"}, [("p", 1, 0)])


def test_an_expired_lease_that_nobody_took_is_renewed(store: Store) -> None:
    """Who only slept too long goes on, with the same fence."""
    lease = store.leases.acquire("run", 0.01)
    time.sleep(0.02)
    assert store.leases.renew(lease, 60.0).fence == lease.fence
    with pytest.raises(Fenced):
        store.leases.acquire("run", 60.0)


def test_holding_renews(store: Store) -> None:
    """A lease that is held outlives its seconds, is seen to be alive by who waits for it, and ends with the block."""
    with store.hold("run", seconds=1.5) as lease:
        time.sleep(2.0)
        began = time.monotonic()
        with pytest.raises(Fenced), store.leases.hold("run", seconds=1.5):
            pass
        assert time.monotonic() - began < 1.5
        store.record("key", "t", {})
        assert store.lease == lease
    assert store.lease is None
    with store.hold("run", seconds=1.5) as again:
        assert again.fence == lease.fence + 1


def test_a_lease_nobody_renews_is_waited_for(store: Store) -> None:
    """Who comes while an abandoned lease has not expired yet waits for that moment, and takes it."""
    store.leases.acquire("run", 0.5, owner="elsewhere:1:1")
    with store.hold("run", seconds=0.5) as lease:
        assert lease.fence == 2


def test_a_holder_that_died_here_is_not_waited_for(store: Store) -> None:
    """A lease of a process of this machine that is gone is free at once, and one of a live process is not."""
    child = subprocess.Popen(["sleep", "60"])
    owner = this_process().split(":")[0] + f":{child.pid}:{_started(child.pid)}"
    store.leases.acquire("run", 1000.0, owner)
    with pytest.raises(Fenced):
        store.leases.acquire("run", 60.0)
    child.kill()
    time.sleep(0.1)  # a dead child that nobody has waited for is gone, too
    assert store.leases.acquire("run", 60.0).fence == 2
    child.wait()


def test_one_of_many_gets_it(store: Store) -> None:
    """Of eight threads that want a lease at once, one has it."""
    got: list[Any] = []

    def want() -> None:
        try:
            got.append(store.leases.acquire("run", 60.0))
        except Fenced as error:
            got.append(error)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(not isinstance(one, Fenced) for one in got) == 1 and len(got) == 8


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_lease_holds_for_some_time(local: Store, seconds: float) -> None:
    """The message names the argument and its value."""
    with pytest.raises(ValueError, match="seconds = "):
        local.leases.acquire("run", seconds)


HOLDER = """
import sys
from pathlib import Path
from stores import Fenced, open_store
store = open_store(Path(sys.argv[1]), *(argument or None for argument in sys.argv[2:]))
with store.hold("run", seconds=0.6):
    print(store.record("first", "t", {}), flush=True)
    sys.stdin.readline()
    try:
        print(store.record("second", "t", {}), flush=True)
    except Fenced as error:
        print(f"fenced: {error}", flush=True)
"""


def test_a_writer_that_was_stopped_past_its_lease_commits_nothing(store: Store, place: Place) -> None:
    """A process that is paused, loses its lease to another and goes on is refused at its next commit."""
    command = [sys.executable, "-c", HOLDER, *(str(part or "") for part in place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == "first\n"
        os.kill(holder.pid, signal.SIGSTOP)
        with store.hold("run", seconds=0.6):
            store.record("mine", "t", {})
            os.kill(holder.pid, signal.SIGCONT)
            holder.stdin.write("go on\n")
            holder.stdin.flush()
            assert holder.stdout.readline().startswith("fenced: lease 'run'")
    assert open_store(*place).catalog.keys() == ["first", "mine"]


def _started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
