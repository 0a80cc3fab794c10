"""Shards on a real Ray of two workers, through Prefect: the same bytes as in one process, whatever happens to them."""

import importlib.util
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import psutil
import pytest

from flows import cluster, prepare, shards
from flows.collecting import collect
from flows.config import Config
from flows.desk import Desk
from flows.do import Do
from flows.gradients import featurize
from flows.orchestration import SILENT, tasks
from flows.progress import Reporter
from flows.run import open_desk
from flows.server import quieten
from flows.server import server as temporary
from stores import Fenced, open_store
from stores.verification import verify
from tests.flows.tiny import configure

if importlib.util.find_spec("prefect_ray") is None:
    pytest.skip(
        "the extra ray is not installed: pip install -c constraints.txt 'influent[ray]'", allow_module_level=True
    )

pytestmark = pytest.mark.timeout(300)
RAY = {"runner": "ray", "parts": 8}
EVIDENCE = {"source": "collect", "shard": 3}
Job = Callable[[Do], Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server, and the environment of its clients."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("PREFECT_")]:
            patch.delenv(name)
        for name, value in SILENT.items():
            patch.setenv(name, value)
        quieten(home)
        with temporary(home) as url:
            patch.setenv("PREFECT_API_URL", url)
            yield


@pytest.fixture(scope="module")
def config(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The settings of a pool of eight shards, each a part."""
    return configure(inputs, tmp_path_factory.mktemp("ray"), evidence=EVIDENCE, cluster=RAY)


@pytest.fixture(scope="module")
def shared(postgres: Callable[[], str], bucket: Callable[[], str]) -> dict[str, str]:
    """A catalog in Postgres and a place in a bucket; how to reach them is in the environment."""
    return {"catalog": postgres(), "objects": bucket()}


@pytest.fixture(scope="module")
def ray(config: Config, server: None, shared: dict[str, str]) -> Iterator[None]:
    """A Ray of two processors, started as ``influent run`` does; its workers have the environment of this process."""
    cluster.connect(config, num_cpus=2)
    yield
    import ray

    ray.shutdown()


@pytest.fixture(scope="module")
def alone(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """A run directory in which one process has collected; the keys of that, and of the gradients it made elsewhere."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    with open_desk(config, folder, Reporter(quiet=True)) as desk:
        start = prepare.start_policy(desk)
        data = prepare.prompts(desk, start)
        rollouts = collect(desk, start, data, "pool", rollouts=4, seed=1)
    whole = copytree(folder, folder.with_name("whole"))
    with open_desk(config, whole, Reporter(quiet=True)) as desk:
        return folder, rollouts, featurize(desk, start, desk.prompts(data, "pool").prompt_uid, rollouts, "pool")


@pytest.fixture
def flow(config: Config, ray: None) -> Callable[[Path, Job], Any]:
    """Runs a job's steps on the cluster, inside a flow."""

    def flow(folder: Path, job: Job, config: Config = config) -> Any:
        import prefect

        def steps() -> Any:
            with open_desk(config, folder, Reporter(quiet=True)) as desk:
                return job(Do(desk, tasks(config)))

        return prefect.flow(steps, persist_result=False)()

    return flow


def gradients_of(rollouts: list[str]) -> Job:
    """The job of featurizing the pool over some rollouts."""

    def job(do: Do) -> Any:
        start = do("start_policy")
        uids = do.desk.prompts(do("prompts", start), "pool").prompt_uid
        return do("featurize", start, uids, rollouts, "pool")

    return job


def digests(folder: Path, keys: list[str]) -> list[dict[str, Any]]:
    """The digest and size of every file of some artifacts."""
    store = open_store(folder / "store")
    return [dict(store.get(key).files) for key in keys]


class Meddler:
    """Waits until the run in a folder has made some generations, stops a worker in the middle of a part, then acts.

    Attributes:
        met: process id of the worker, and how many generations were there when it stopped.
    """

    def __init__(self, folder: Path, after: int, act: Callable[[psutil.Process], None]) -> None:
        self.met: tuple[int, int] | None = None
        self._folder, self._after, self._act = folder, after, act
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Meddler":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _can_write(self) -> bool:
        with closing(sqlite3.connect(self._folder / "store" / "catalog.sqlite", timeout=0.2)) as catalog:
            try:
                catalog.execute("begin immediate")
            except sqlite3.OperationalError:
                return False
            catalog.rollback()
            return True

    def _watch(self) -> None:
        store = open_store(self._folder / "store")
        while not self._over.is_set() and self.met is None:
            if len(store.catalog.keys("gradients")) >= self._after:
                for process in psutil.Process().children(recursive=True):
                    if "featurize" in "".join(process.cmdline()):
                        process.send_signal(signal.SIGSTOP)
                        if not self._can_write():  # stopped in mid-commit, it would hold up everybody
                            process.send_signal(signal.SIGCONT)
                            continue
                        self.met = process.pid, len(store.catalog.keys("gradients"))
                        self._act(process)
                        break
            time.sleep(0.005)


def test_two_workers_make_the_bytes_of_one_process(flow: Any, alone: Any, tmp_path: Path):
    """Generations have the keys and the digests of those that one process makes, and were made by two others."""
    folder, rollouts, expected = alone
    made = flow(copytree(folder, tmp_path / "run"), gradients_of(rollouts))
    assert made == expected and len(made) == 8
    assert digests(tmp_path / "run", made) == digests(folder.with_name("whole"), made)


def test_a_worker_that_is_killed_half_way_changes_nothing(flow: Any, alone: Any, tmp_path: Path):
    """SIGKILL of a worker in the middle of a part: another one makes it, with the same bytes."""
    folder, rollouts, expected = alone
    with Meddler(copytree(folder, tmp_path / "run"), 2, lambda process: process.kill()) as meddler:
        made = flow(tmp_path / "run", gradients_of(rollouts))
    assert meddler.met is not None and meddler.met[1] < 8 and not psutil.pid_exists(meddler.met[0])
    assert made == expected
    assert digests(tmp_path / "run", made) == digests(folder.with_name("whole"), made)


def test_a_part_that_is_late_is_made_elsewhere(flow: Any, alone: Any, tmp_path: Path, monkeypatch: Any):
    """A worker that stands still holds nobody up; when it goes on, its part counts once."""
    monkeypatch.setattr(cluster, "LATE_LEAST", 2.0)
    folder, rollouts, expected = alone
    began = time.monotonic()
    with Meddler(copytree(folder, tmp_path / "run"), 2, lambda process: None) as meddler:
        made = flow(tmp_path / "run", gradients_of(rollouts))
    assert meddler.met is not None and meddler.met[1] < 8
    stopped = psutil.Process(meddler.met[0])
    assert stopped.status() == psutil.STATUS_STOPPED and time.monotonic() - began < 60
    stopped.send_signal(signal.SIGCONT)
    stopped.wait(30)  # what is late is ended
    assert made == expected
    assert digests(tmp_path / "run", made) == digests(folder.with_name("whole"), made)


def test_collecting_draws_the_same_tokens(flow: Any, alone: Any, tmp_path: Path):
    """Rollouts from two workers are those of one process, token for token, and count the same."""
    folder, rollouts, _ = alone

    def job(do: Do) -> Any:
        start = do("start_policy")
        return do("collect", start, do("prompts", start), "pool", rollouts=4, seed=1)

    made = flow(tmp_path / "run", job)
    assert made == rollouts
    mine, theirs = open_store(tmp_path / "run" / "store"), open_store(folder / "store")
    assert mine.beliefs.history(made) == theirs.beliefs.history(made)
    for name in ("prompt_uid", "sample", "completion_ids", "verdict", "text"):
        ours, others = (store.trajectories.read(made, [name])[name] for store in (mine, theirs))
        assert all(np.array_equal(x, y) for x, y in zip(ours, others, strict=True)), name


def test_what_is_done_is_not_asked_for(flow: Any, alone: Any, tmp_path: Path, monkeypatch: Any):
    """Of a step that was half done, the other half alone goes to the workers; of one that is done, nothing does."""
    folder, rollouts, expected = alone
    asked, request = [], shards.request

    def counted(desk: Desk, step: str, *args: Any, **kwargs: Any) -> str:
        asked.append(step)
        return request(desk, step, *args, **kwargs)

    monkeypatch.setattr(shards, "request", counted)

    def job(do: Do) -> Any:
        start = do("start_policy")
        uids = do.desk.prompts(do("prompts", start), "pool").prompt_uid
        featurize(do.desk, start, uids[:9], rollouts, "some")
        return [gradients_of(rollouts)(do) for _ in range(2)]

    assert flow(copytree(folder, tmp_path / "run"), job) == [expected, expected]
    assert asked == ["featurize"] * 5


def test_a_run_that_was_taken_over_ends(flow: Any, alone: Any, tmp_path: Path):
    """Workers of a process that lost its lease commit nothing, are not tried again, and the flow says who goes on."""
    folder, rollouts, _ = alone

    def job(do: Do) -> Any:
        desk: Desk = do.desk
        assert desk.store.lease is not None
        desk.store.leases.release(desk.store.lease)
        desk.store.leases.acquire(desk.store.lease.name, 60.0, "another")
        return gradients_of(rollouts)(do)

    with pytest.raises(Fenced, match="taken over by another"):
        flow(copytree(folder, tmp_path / "run"), job)
    assert open_store(tmp_path / "run" / "store").catalog.keys("gradients") == []


def test_workers_share_a_catalog_in_postgres_and_a_bucket(
    config: Config, flow: Any, alone: Any, shared: dict[str, str], tmp_path: Path
):
    """Two workers that write to Postgres and S3 make the keys of one process with SQLite and files, and all is whole."""
    _, rollouts, expected = alone

    def job(do: Do) -> Any:
        start = do("start_policy")
        data = do("prompts", start)
        made = do("collect", start, data, "pool", rollouts=4, seed=1)
        return made, do("featurize", start, do.desk.prompts(data, "pool").prompt_uid, made, "pool")

    assert flow(tmp_path / "run", job, config.model_copy(update=shared)) == (rollouts, expected)
    store = open_store(tmp_path / "other", **{f"{name}_url": url for name, url in shared.items()})
    assert all(not verdict.wrong for verdict in verify(store))
    assert len(store.trajectories.read(rollouts, ["prompt_uid"])["prompt_uid"]) == 24 * 4
