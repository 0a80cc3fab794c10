"""``evaluate --validity``: the newest checkpoint, everything once, refused where the truth cannot be computed."""

import json
import re
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from flows.cli import main
from flows.config import Config, to_toml
from flows.do import STEPS
from flows.progress import Reporter
from flows.run import open_desk
from flows.validity import FILE, measure, newest, stored
from pipeline.scorers import SCORERS
from stores import open_store
from tests.flows.tiny import keys_of, quiet

PROMPTS = 8  # of the 24 of the tiny pool


@pytest.fixture
def file(tiny: Config, tmp_path: Path) -> str:
    (tmp_path / "tiny.toml").write_text(to_toml(tiny))
    return str(tmp_path / "tiny.toml")


def test_the_command_measures_once(
    capsys: pytest.CaptureFixture[str], begun: Path, file: str, monkeypatch: pytest.MonkeyPatch
):
    """The command prints, stores and writes the result at the newest checkpoint; asked again it computes nothing."""
    argv = ["evaluate", file, "--dir", str(begun), "--validity", "--prompts", str(PROMPTS), "--json"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    result = json.loads(printed.out)
    assert result == json.loads((begun / FILE).read_text())
    assert result["step"] == 2 and result["prompts"]["asked"] == PROMPTS
    assert {name for sets in result["agreement"].values() for found in sets.values() for name in found} == set(SCORERS)
    assert result["held_out"] == {"validation": 8, "test": 8}
    table = open_store(begun / "store").tables.read(result["key"])
    assert len(table["prompt_uid"]) == result["prompts"]["signal"] == result["agreement"]["unit"]["test"]["cropi"]["n"]
    before = keys_of(begun)
    for name in ("evaluation.greedy_accuracy", "rollouts.collect", "training.train", "validity.compare"):
        monkeypatch.setattr(f"pipeline.{name}", None)
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert keys_of(begun) == before
    assert main(argv[:-1]) == 0
    plain = capsys.readouterr()
    assert "rank agreement of scores with the change of expected reward, validation" in plain.err
    assert all(re.search(rf"^{name}: unit [+-]\d", plain.out, re.MULTILINE) for name in ("cropi", "dot", "exact"))


def test_the_newest_checkpoint_is_the_curriculums(
    tiny: Config, finished: tuple[Path, dict[str, Any]], begun: Path, tmp_path: Path
):
    """The last step of the curriculum, not of a control; the start where nothing was trained; and nothing is made."""
    folder, summary = finished
    for place, step in ((folder, 6), (begun, 2), (tmp_path / "new", 0)):
        with open_desk(tiny, place, Reporter(quiet=True)) as desk:
            start = STEPS["start_policy"](desk)
            data = STEPS["prompts"](desk, start)
            before = keys_of(place)
            found = newest(desk, start, data)
            assert keys_of(place) == before
            assert found[0] == step
            level = [
                point["sets"]["test"]["expected_reward"]
                for point in summary["runs"][0]["arms"]["curriculum"]["curve"]
                if point["step"] == step
            ]
            key = STEPS["evaluate"](desk, found[1], data, ["add", "rev", "test"])
            assert desk.store.meta(key)["sets"]["test"]["expected_reward"] == pytest.approx(level[0], abs=1e-6)


def test_the_report_shows_what_was_measured(tiny: Config, finished: tuple[Path, dict[str, Any]], tmp_path: Path):
    """The page of a run says that validity was not measured; once it was, it shows it, and does not mix up runs."""
    folder = copytree(finished[0], tmp_path / "run")
    assert "Not measured in this run" in (folder / "report.html").read_text()
    with open_desk(tiny, folder, Reporter(quiet=True)) as desk:
        measure(desk, PROMPTS)
    quiet(tiny, folder)
    page = (folder / "report.html").read_text()
    assert "Not measured in this run" not in page and f"after 6 steps: {PROMPTS} prompts with 8 rollouts" in page
    (folder / FILE).write_text(json.dumps({"key": "validity-" + "0" * 24}))
    with open_desk(tiny, folder, Reporter(quiet=True)) as desk:
        assert stored(desk) is None


def test_what_has_no_exact_truth_is_refused(
    capsys: pytest.CaptureFixture[str], inputs: Path, tiny: Config, tmp_path: Path
):
    """A verifier other than exact match ends the command with the set, the verifier and the remedy, before any rollout."""
    source = {"path": f"{inputs}/test.jsonl", "data_source": "tiny", "verifier": {"id": "numeric"}}
    sets = tiny.prompts.model_copy(update={"test": (source,), "bad_gold": "drop"})
    other = tiny.model_copy(update={"prompts": sets, "evaluate": tiny.evaluate.model_copy(update={"exact": False})})
    (tmp_path / "other.toml").write_text(to_toml(other))
    assert main(["evaluate", str(tmp_path / "other.toml"), "--validity", "--dir", str(tmp_path / "run"), "--json"]) == 1
    said = capsys.readouterr().err
    assert "[prompts] test" in said and "numeric" in said and '"exact"' in said
    assert not [key for key in keys_of(tmp_path / "run") if key.startswith("rollouts-")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompts", "8"], "--validity"),
        (["--validity", "--stage", "0"], "--stage"),
        (["--validity", "--prompts", "25"], "24 prompts"),
        (["--validity", "--prompts", "1"], "--prompts 1"),
    ],
)
def test_options_without_meaning_are_refused(
    capsys: pytest.CaptureFixture[str], file: str, begun: Path, options: list[str], said: str
):
    """Each option says what it goes with, and how many prompts there are to draw."""
    assert main(["evaluate", file, "--dir", str(begun), *options, "--json"]) == 1
    assert said in capsys.readouterr().err
