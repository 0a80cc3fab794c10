"""Trackers get the numbers of the metrics, all of them, and never decide how a run goes."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flows.config import Config, ConfigError, load_config
from flows.curriculum import Do, Reached, run_seed
from flows.progress import Reporter
from flows.run import open_desk, plain
from flows.tracking import OPENERS, Trackers, flat, numbers, reporting
from tests.flows.tiny import CONFIG, keys_of, quiet

Finished = tuple[Path, dict[str, Any]]


def scalars(folder: Path) -> dict[tuple[str, int], list[float]]:
    """Everything that a reader of TensorBoard finds, by name and step."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault((name, event.step), []).append(event.value)
    return found


@pytest.fixture(scope="module")
def watched(finished: Finished, tiny: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that TensorBoard watched until it was cut short after a stage, and then again, from its start to its end."""
    folder = copytree(finished[0], tmp_path_factory.mktemp("watched") / "run")
    config = tiny.model_copy(update={"report_to": ("tensorboard",)})
    with open_desk(config, folder, Reporter(quiet=True)) as desk, reporting(desk), pytest.raises(Reached):
        run_seed(Do(desk, plain, until=("evaluate", 0)))
    assert scalars(folder / "tensorboard" / "tiny-seed0")
    quiet(config, folder)
    return folder


def test_a_tracker_gets_what_the_metrics_have(watched: Path):
    """After a run that took up what was stored, TensorBoard has each number of ``metrics.jsonl`` once, and no other."""
    lines = [json.loads(line) for line in (watched / "metrics.jsonl").read_text().splitlines()]
    wanted = {(name, line["step"]): value for line in lines for name, value in numbers(line).items()}
    assert {name.split("/")[0] for name, _ in wanted} == {"curriculum", "control", "random"}
    found = scalars(watched / "tensorboard" / "tiny-seed0")
    assert found == {at: [float(np.float32(value))] for at, value in wanted.items()}


def test_watching_changes_no_key(watched: Path, finished: Finished):
    """A run that is watched has the keys of one that is not, its settings' record among them."""
    assert keys_of(watched) == keys_of(finished[0])
    assert load_config(watched / "config.toml").report_to == ("tensorboard",)


def test_a_tracker_that_cannot_start_does_not_end_the_run(finished: Finished, tiny: Config, tmp_path: Path):
    """Where a file is in the way of a tracker's folder, the run warns once, by the tracker's name, and ends well."""
    folder = copytree(finished[0], tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    (folder / "tensorboard").write_text("in the way")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet(tiny.model_copy(update={"report_to": ("tensorboard",), "controls": False}), folder)
    told = [str(w.message) for w in caught if "report_to" in str(w.message)]
    assert len(told) == 1 and "'tensorboard'" in told[0] and "metrics.jsonl" in told[0]
    assert (folder / "metrics.jsonl").read_text()


def test_a_tracker_that_breaks_is_left_out(tiny: Config, tmp_path: Path):
    """A tracker whose folder is lost while the run goes on is warned about once, and keeps what it got before."""
    trackers = Trackers(tiny.model_copy(update={"report_to": ("tensorboard",)}), tmp_path)
    trackers.log({"curriculum/train/reward": 0.5}, 1)
    place = tmp_path / "tensorboard" / "tiny-seed0"
    assert scalars(place) == {("curriculum/train/reward", 1): [0.5]}
    trackers.finish()  # the next number opens another file
    rmtree(place)
    place.write_text("in the way")
    with pytest.warns(UserWarning, match="'tensorboard' failed"):
        trackers.log({"curriculum/train/reward": 0.75}, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.log({"curriculum/train/reward": 1.0}, 3)
        trackers.finish()


def test_a_tracker_that_is_not_installed_is_refused_at_the_start(tiny: Config, tmp_path: Path):
    """A missing library ends the run before its directory is made, with the install that mends it."""
    missing = next((name for name in OPENERS if find_spec(name) is None), None)
    if missing is None:
        pytest.skip("every tracker is installed here")
    with pytest.raises(ConfigError, match=f"{missing}.*pip install {missing}"):
        quiet(tiny.model_copy(update={"report_to": ("tensorboard", missing)}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused_when_the_file_is_read(inputs: Path, tmp_path: Path):
    """A name that is no tracker's is refused with the names that there are."""
    file = tmp_path / "tiny.toml"
    file.write_text('report_to = ["tensorbord"]\n' + CONFIG.format(inputs=inputs))
    with pytest.raises(ConfigError, match=r"report_to.*got 'tensorbord'") as refused:
        load_config(file)
    assert all(repr(name) in str(refused.value) for name in OPENERS)


def test_names_say_arm_kind_and_metric():
    """A step's numbers are named for training, an evaluation's for their set; what places a row is no number of it."""
    where = {"seed": 3, "arm": "control", "stage": 1, "step": 7}
    assert numbers(where | {"reward": 0.5, "clipped": True}) == {
        "control/train/stage": 1.0,
        "control/train/reward": 0.5,
        "control/train/clipped": 1.0,
    }
    level = {"test": {"greedy_accuracy": 0.25}, "add": {"greedy_accuracy": 0.75}}
    assert numbers(where | {"evaluation": level}) == {
        "control/eval/test/greedy_accuracy": 0.25,
        "control/eval/add/greedy_accuracy": 0.75,
    }


def test_settings_go_as_single_values():
    """Settings are named by their path, and lists are text."""
    settings = {"name": "a", "train": {"lr": 0.5, "stages": [2, 1], "deep": {"on": True}}}
    assert flat(settings) == {"name": "a", "train.lr": 0.5, "train.stages": "[2, 1]", "train.deep.on": True}
