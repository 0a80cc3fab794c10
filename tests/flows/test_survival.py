"""What outlives a worker, a server and a machine: everything that was finished, and the schedule."""

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.config import Config, to_toml
from flows.curate import curate
from flows.progress import Reporter
from flows.server import server
from stores import open_store
from tests.flows.tiny import keys_of
from tests.servers import Prefect, free_port

ROOT = Path(__file__).parents[2]
REGISTER = """
import sys
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.types.entrypoint import EntrypointType
from flows.deploy import _ensure_end_of_silence, _ensure_pool
from tests.flows.scheduled import fragile

_ensure_pool("fragile")
_ensure_end_of_silence()
fragile.to_deployment(
    "fragile", work_pool_name="fragile", tags=["influent"], entrypoint_type=EntrypointType.MODULE_PATH,
    job_variables={"working_dir": sys.argv[1], "env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}},
    concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy="ENQUEUE", grace_period_seconds=60),
).apply()
"""


@pytest.fixture(scope="module")
def settings(inputs: Path, tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a short curation, as a file."""
    evidence = tiny.evidence.model_copy(update={"source": "collect", "rollouts": 4})
    file = tmp_path_factory.mktemp("survival") / "tiny.toml"
    file.write_text(to_toml(tiny.model_copy(update={"evidence": evidence})))
    return file


@pytest.fixture(scope="module")
def undisturbed(settings: Path) -> tuple[Path, dict[str, Any]]:
    """The directory and the result of a plain run that nobody killed."""
    from flows.config import load_config

    folder = settings.parent / "undisturbed"
    return folder, curate(load_config(settings), folder, Reporter(quiet=True))


def _register(prefect: Prefect) -> None:
    command = [sys.executable, "-c", REGISTER, str(ROOT)]
    ended = subprocess.run(command, env=prefect.environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def _assert_nothing_twice(log: Path, folder: Path, undisturbed: tuple[Path, dict[str, Any]]) -> None:
    """The last run came to the selection of a run that nobody killed, and no finished step was done again."""
    reference, made = undisturbed
    entries = Counter(log.read_text().splitlines())
    commits = [entry for entry in entries if entry.startswith("committed ")]
    assert len(commits) > 8 and max(entries[entry] for entry in commits) == 1
    assert keys_of(folder) == keys_of(reference)
    name = f"{made['selection']}"
    one, two = (open_store(f / "store").get(name) for f in (folder, reference))
    assert one.files == two.files
    for file in ("manifest.json", "selection.parquet", "data/stage_00/train.parquet"):
        assert (folder / "export" / file).read_bytes() == (reference / "export" / file).read_bytes()


def _wait_until_dead(worker: subprocess.Popen[bytes]) -> None:
    assert worker.wait(120) == -signal.SIGKILL


@pytest.mark.timeout(900)
def test_the_worker_is_killed_at_each_step(
    prefect: Prefect, settings: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
):
    """A worker that dies with its run after each step in turn: the next run goes on from there, and does nothing twice."""
    _register(prefect)
    log, folder, number = tmp_path / "log", tmp_path / "run", 0
    asked = {"config": str(settings), "directory": str(folder), "log": str(log)}
    while not log.with_suffix(".done").exists():
        number += 1
        with prefect.worker("fragile", tmp_path / "worker.log") as worker:
            run = prefect.start("fragile/fragile", **asked, after=number)
            until = time.monotonic() + 200
            while worker.poll() is None and prefect.state(run)[0] != "Completed":
                assert prefect.state(run)[0] not in ("Failed", "Cancelled"), prefect.state(run)[1]
                assert time.monotonic() < until, prefect.state(run)
                time.sleep(0.25)
            if log.with_suffix(".done").exists():
                break
            _wait_until_dead(worker)
        crashed = {"state": {"type": "CRASHED"}, "force": True}  # what the server does itself after 90 silent seconds
        prefect.ask("POST", f"/flow_runs/{run}/set_state", crashed)
    assert number > 10
    _assert_nothing_twice(log, folder, undisturbed)
    computed = Counter(line for line in log.read_text().splitlines() if line.startswith("computed "))
    assert computed["computed sketch_gradients"] == 3, "two validation sets and the pool, each of one shard"


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[[], Any]]:
    """Starts a server that may be killed, and starts it again on the same port and the same files."""
    port = free_port()
    yield lambda: server(tmp_path / "prefect", port)


@pytest.mark.timeout(900)
def test_everything_dies_in_mid_flow(
    own_server: Callable[[], Any], settings: Path, undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
):
    """Server, worker and run die and come back: the dead run gives its slot back by itself, and the next one goes on."""
    log, folder = tmp_path / "log", tmp_path / "run"
    asked = {"config": str(settings), "directory": str(folder), "log": str(log)}
    with own_server() as url:
        prefect = Prefect(url, tmp_path / "prefect")
        _register(prefect)
        victim = _process_of(prefect)
        with prefect.worker("fragile", tmp_path / "worker.log"):
            run = prefect.start("fragile/fragile", **asked, after=5, server=victim)
            until = time.monotonic() + 200
            while Path(f"/proc/{victim}/stat").exists() and _state_of(victim) != "Z":
                assert time.monotonic() < until
                time.sleep(0.25)
    with own_server() as url, prefect.worker("fragile", tmp_path / "worker.log"):
        again = prefect.start("fragile/fragile", **asked)
        prefect.wait(again, "AwaitingConcurrencySlot")
        assert prefect.state(run)[0] == "Running", "nobody has told the server that it died"
        prefect.wait(again, "Completed", seconds=500)
        assert prefect.state(run)[0] == "Crashed"
    _assert_nothing_twice(log, folder, undisturbed)


def _process_of(prefect: Prefect) -> int:
    port = prefect.url.partition("127.0.0.1:")[2].partition("/")[0]
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                words = (place / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"uvicorn" in words and port.encode() in words:
                return int(place.name)
    raise AssertionError("the server is not to be found")


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
