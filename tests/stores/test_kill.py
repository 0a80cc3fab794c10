"""Killed writers: nothing acknowledged is lost, nothing half done is seen, and the rest of the world goes on."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stores import disk, open_store
from stores.collector import orphans
from stores.verification import verify
from tests.stores.killed import counts

ROOT = Path(__file__).parents[2]
ROUNDS = 20  # 25 times as many in the long form


@pytest.fixture(scope="module")
def trial() -> Iterator[Callable[..., None]]:
    """Runs a round of writers in a process that has imported everything already."""
    command = [sys.executable, "-m", "tests.stores.killed"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdin is not None and driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"

        def ask(**request: Any) -> None:
            driver.stdin.write(json.dumps(request, default=str) + "\n")
            driver.stdin.flush()
            assert driver.stdout.readline() == "done\n"

        yield ask
        driver.stdin.close()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("catalog", ["sqlite", "postgres"])
def test_nothing_acknowledged_is_lost_and_nothing_is_partial(
    request: pytest.FixtureRequest, trial: Callable[..., None], tmp_path: Path, torture: int, catalog: str
) -> None:
    """Two writers killed at random moments, round after round: every acknowledged commit is there, and each is whole."""
    place = (tmp_path / "store", None if catalog == "sqlite" else request.getfixturevalue("postgres")(), None)
    rounds, rng, log = ROUNDS * torture, random.Random(catalog), tmp_path / "acknowledged"
    open_store(*place)
    log.touch()
    longest, told, number = 0.15 if catalog == "sqlite" else 0.3, 0, 0
    while number < rounds or told <= rounds:
        delays = [rng.uniform(0.01, longest) for _ in range(2)]
        trial(place=place, acknowledged=log, writers=2, round=number, delays=delays)
        before, told, number = told, len(set(log.read_text().split())), number + 1
        longest *= 1.5 if told == before else 1.0  # on a busy machine writers need longer for a first commit
    store, acknowledged, rounds = open_store(*place), log.read_text().split(), number
    keys = store.catalog.keys()
    assert set(acknowledged) <= set(keys), "an acknowledged commit is lost"
    assert len(set(keys) - set(acknowledged)) <= 2 * rounds  # a commit a writer may not have been told of
    for key in keys:
        artifact, counted = store.get(key), store.beliefs.history([key])
        if "shared" in key:
            assert counted == {"shared": [(1, 1)]}
        else:
            assert set(artifact.files) == {"own", "same"}
            assert counted == {uid: [(won, lost)] for uid, won, lost in counts(key)}
    assert all(verdict.wrong is None for verdict in verify(store))
    assert len(orphans(store)) <= 2 * rounds
    shared = [key for key in keys if "shared" in key]
    assert store.beliefs.totals(keys)["shared"] == (len(shared), len(shared)), "what both committed counts once"


WRITER = """
import sys
from pathlib import Path
from stores import open_store
store, writer = open_store(Path(sys.argv[1]), *(argument or None for argument in sys.argv[3:])), sys.argv[2]
for number in range(15):
    store.record(f"{writer}-{number}", "t", {"number": number}, {"f": writer.encode(), "g": b"same"}, [("p", 1, 2)])
    store.record(f"both-{number}", "t", {"number": number}, {"g": b"same"}, [("p", 1, 0)])
"""


def test_writers_take_turns(place: tuple[Any, ...]) -> None:
    """Three processes that open a new store and commit to it at once all succeed; what they share counts once."""
    command = [sys.executable, "-c", WRITER, str(place[0])]
    processes = [
        subprocess.Popen([*command, f"writer{n}", *(url or "" for url in place[1:])], cwd=ROOT) for n in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    keys = open_store(*place).catalog.keys()
    assert sorted(keys) == sorted(
        f"{name}-{n}" for name in ("both", "writer0", "writer1", "writer2") for n in range(15)
    )
    assert open_store(*place).beliefs.totals(keys)["p"] == (60, 90)


def test_a_large_store_opens_at_once_after_a_kill(
    trial: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store of 10,000 objects whose writers were killed opens in under a second, and no command repairs it."""
    store = open_store(tmp_path / "store")
    with monkeypatch.context() as patch:  # what is timed is the opening
        for name in ("sync", "sync_folder"):
            patch.setattr(disk, name, lambda _: None)
        for number in range(10):
            store.record(f"many-{number}", "t", {}, {f"f{n}": f"{number} {n}".encode() for n in range(1000)})
    place, log, number = (store.root, None, None), tmp_path / "log", 0
    log.touch()
    while not log.read_text():  # on a busy machine writers need longer for a first commit
        delays = [0.2 * 1.5**number, 0.25 * 1.5**number]
        trial(place=place, acknowledged=log, writers=2, round=number, delays=delays)
        number += 1
    assert sum(1 for _ in os.scandir(store.objects.folder)) == 256
    began = time.perf_counter()
    again = open_store(tmp_path / "store")
    assert again.file("many-9", "t", "f999").read_bytes() == b"9 999"
    assert time.perf_counter() - began < 1.0
    acknowledged = log.read_text().split()
    assert all(again.done(key) for key in acknowledged)
