"""A run that dies at any moment is finished by the same command, as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.config import Config, to_toml
from tests.flows.killed import COMPUTED
from tests.flows.tiny import keys_of, timeless

ROOT = Path(__file__).parents[2]
Trial = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def trial() -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a configuration in a child of a process that has imported everything already."""
    program = [sys.executable, "-m", "tests.flows.killed"]
    with subprocess.Popen(
        program,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    ) as driver:
        assert driver.stdin is not None and driver.stdout is not None
        driver.stdout.readline()

        def ask(**request: Any) -> dict[str, Any]:
            driver.stdin.write(json.dumps(request, default=str) + "\n")
            driver.stdin.flush()
            return json.loads(driver.stdout.readline())

        yield ask
        driver.stdin.close()


@pytest.fixture(scope="module")
def config_file(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a still shorter run, with its controls, as a file."""
    file = tmp_path_factory.mktemp("resume") / "tiny.toml"
    file.write_text(to_toml(tiny.model_copy(update={"train": tiny.train.model_copy(update={"stages": (1, 2)})})))
    return file


@pytest.fixture(scope="module")
def undisturbed(trial: Trial, config_file: Path) -> tuple[Path, Counter[str], float]:
    """The directory, the log and the seconds of a run that nobody killed."""
    folder, log = config_file.parent / "undisturbed", config_file.parent / "undisturbed.log"
    ended = trial(config=config_file, folder=folder, log=log)
    assert (ended["signal"], ended["code"]) == (0, 0)
    return folder, _entries(log), ended["seconds"]


def _entries(log: Path) -> Counter[str]:
    return Counter(log.read_text().splitlines())


def _assert_equal_results(folder: Path, other: Path) -> None:
    one, two = (timeless(json.loads((f / "summary.json").read_text())) for f in (folder, other))
    assert one == two
    for name in ("manifest.json", "selection.parquet", "data/stage_01/train.parquet"):
        assert (folder / "export" / name).read_bytes() == (other / "export" / name).read_bytes()
    assert keys_of(folder) == keys_of(other)


@pytest.mark.timeout(600)
def test_killed_after_every_step(trial: Trial, config_file: Path, undisturbed: Any, tmp_path: Path):
    """A run that is killed after each of its steps in turn ends as one that was never killed, and repeats nothing."""
    reference, log, _ = undisturbed
    assert all(log[f"computed {name}"] for name in COMPUTED.values())
    steps = next(int(entry.split()[1]) for entry in log if entry.startswith("steps"))
    request = {"config": config_file, "folder": tmp_path / "run", "log": tmp_path / "log"}
    for number in range(1, steps + 1):
        assert trial(**request, after=number)["signal"] == signal.SIGKILL
    assert trial(**request)["code"] == 0
    _assert_equal_results(tmp_path / "run", reference)
    assert _entries(tmp_path / "log") == log


@pytest.mark.parametrize("number", [1, 4])
def test_killed_between_the_two_commits_of_a_training_step(
    trial: Trial, config_file: Path, undisturbed: Any, tmp_path: Path, number: int
):
    """Rollouts that were stored without their checkpoint are made again, the same, and count once."""
    request = {"config": config_file, "folder": tmp_path / "run", "log": tmp_path / "log"}
    assert trial(**request, commit=number)["signal"] == signal.SIGKILL
    assert trial(**request)["code"] == 0
    _assert_equal_results(tmp_path / "run", undisturbed[0])


def test_killed_at_random_moments(trial: Trial, config_file: Path, undisturbed: Any, tmp_path: Path):
    """A run that is killed five times at random ends as one that was never killed; no checkpoint is made twice."""
    reference, _, seconds = undisturbed
    request = {"config": config_file, "folder": tmp_path / "run", "log": tmp_path / "log"}
    rng = random.Random(0)
    ends = [trial(**request, delay=rng.uniform(0.05, 0.35) * seconds)["signal"] for _ in range(5)]
    assert signal.SIGKILL in ends
    assert trial(**request)["code"] == 0
    _assert_equal_results(tmp_path / "run", reference)
    again = [e for e, n in _entries(tmp_path / "log").items() if n > 1 and e.startswith("committed")]
    first = ("committed rollouts-", "committed staleness-")  # committed before what they belong to, and so again
    assert all(entry.startswith(first) for entry in again)


def test_killed_while_the_results_are_written(trial: Trial, config_file: Path, undisturbed: Any, tmp_path: Path):
    """A finished run that is killed while its results are written again still has, or gets again, all of them."""
    reference, _, _ = undisturbed
    request = {"config": config_file, "folder": tmp_path / "run", "log": tmp_path / "log"}
    whole = trial(**request)
    again = trial(**request)
    assert (whole["code"], again["code"]) == (0, 0)
    for share in (0.5, 0.7, 0.85, 0.95):
        trial(**request, delay=share * again["seconds"])
        json.loads((tmp_path / "run" / "summary.json").read_text())
        assert (tmp_path / "run" / "report.html").read_text().rstrip().endswith("</html>")
    assert trial(**request)["code"] == 0
    _assert_equal_results(tmp_path / "run", reference)
