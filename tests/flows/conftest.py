"""One set of inputs, one finished run and one that has only begun, for all tests here."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from flows.config import Config
from tests.flows.tiny import configure, make_inputs, quiet


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and JSON lines of pool, validation and test."""
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def tiny(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The settings of the finished run."""
    return configure(inputs, tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def finished(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The directory and the summary of an undisturbed run with its controls."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, quiet(tiny, folder)


@pytest.fixture(scope="session")
def _begun(tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flows.curriculum import run_seed
    from flows.do import Do, Reached
    from flows.progress import Reporter
    from flows.run import open_desk, plain

    folder = tmp_path_factory.mktemp("begun") / "run"
    with open_desk(tiny, folder, Reporter(quiet=True)) as desk, pytest.raises(Reached):
        run_seed(Do(desk, plain, until=("train", 0)))
    return folder


@pytest.fixture
def begun(_begun: Path, tmp_path: Path) -> Path:
    """A run directory of one's own in which the first stage is trained."""
    return copytree(_begun, tmp_path / "begun")


@pytest.fixture
def settle(inputs: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes the tiny settings with some sections or keys changed."""
    return lambda **changes: configure(inputs, tmp_path, **changes)
