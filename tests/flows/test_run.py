"""What a run leaves behind, and what does not change it."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.config import Config, load_config
from pipeline.records import REASONS
from stores import open_store
from stores.verification import verify
from tests.flows.killed import COMPUTED
from tests.flows.tiny import keys_of, quiet, timeless

Finished = tuple[Path, dict[str, Any]]
Settle = Callable[..., Config]
SHORT = {"controls": False, "train": {"stages": (1, 1)}}


def stage_of(folder: Path, number: int, kind: str = "data") -> list[dict[str, Any]]:
    return pq.read_table(folder / "export" / kind / f"stage_{number:02d}" / "train.parquet").to_pylist()


def seconds_in(value: Any) -> Iterator[float]:
    """Yield every number that a clock gave."""
    if isinstance(value, list):
        for item in value:
            yield from seconds_in(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if "seconds" in name:
                yield from item.values() if isinstance(item, dict) else [item]
            else:
                yield from seconds_in(item)


def test_a_run_directory_is_complete(finished: Finished, tiny: Config):
    """A run directory holds the resolved settings, the metrics, the summary, the report, the export and the store."""
    folder, summary = finished
    assert {p.name for p in folder.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "export",
        "store",
    }
    assert load_config(folder / "config.toml") == tiny
    assert timeless(json.loads((folder / "summary.json").read_text())) == timeless(json.loads(json.dumps(summary)))
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")


def test_every_step_and_evaluation_is_a_line_of_the_metrics(finished: Finished):
    """``metrics.jsonl`` has a line for each optimizer step of each arm, and one for the evaluation after it."""
    folder, summary = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    arms = summary["runs"][0]["arms"]
    for name, arm in arms.items():
        mine = [line for line in lines if line["arm"] == name]
        assert [line["step"] for line in mine if "evaluation" in line] == list(range(1, arm["steps"] + 1))
        assert len(mine) == 2 * arm["steps"]
        assert mine[-1]["evaluation"] == arm["final"]
    assert {line["arm"] for line in lines} == set(arms)


def test_no_time_is_negative(finished: Finished):
    """Every number of seconds is finite and at least zero."""
    folder, summary = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = list(seconds_in([summary, lines]))
    assert times and all(math.isfinite(s) and s >= 0 for s in times)


def test_a_stage_loads_as_a_data_set(finished: Finished, tmp_path: Path):
    """``datasets.load_dataset`` reads a stage and its control by name from the exported folder."""
    import datasets

    export = str(finished[0] / "export")
    stage = datasets.load_dataset(export, "stage_01", cache_dir=str(tmp_path))["train"]
    control = datasets.load_dataset(export, "control_01", cache_dir=str(tmp_path))["train"]
    assert len(stage) == len(control) == 8
    assert stage["rank"][:] == list(range(8))
    assert stage[0]["prompt"][0]["role"] == "user"


def test_every_prompt_has_one_reason_in_each_stage(finished: Finished):
    """In each stage every prompt has exactly one reason, and those selected are the stage that is exported."""
    folder, summary = finished
    rows = pq.read_table(folder / "export" / "selection.parquet").to_pylist()
    for number in range(3):
        mine = [row for row in rows if row["stage"] == number]
        assert len({row["prompt_uid"] for row in mine}) == len(mine) == 24
        assert {row["reason"] for row in mine} <= set(REASONS)
        chosen = {row["prompt_uid"] for row in mine if row["reason"] == "selected"}
        assert chosen == {row["prompt_uid"] for row in stage_of(folder, number)}
        told = summary["runs"][0]["arms"]["curriculum"]["stages"][number]["by_reason"]
        assert told == Counter(row["reason"] for row in mine)


def test_controls_are_of_equal_size(finished: Finished):
    """Each stage's control has as many prompts as the stage, and a stage that was a shuffle is its own control."""
    folder, _ = finished
    stages = [[row["prompt_uid"] for row in stage_of(folder, number)] for number in range(3)]
    controls = [[row["prompt_uid"] for row in stage_of(folder, number, "control")] for number in range(3)]
    assert [len(set(stage)) for stage in stages] == [len(set(control)) for control in controls]
    assert stages[0] == controls[0]
    assert stages[1:] != controls[1:]


def test_the_control_shares_what_it_can(finished: Finished):
    """The control's first stage is the curriculum's, step by step; they part where the selection begins."""
    arms = finished[1]["runs"][0]["arms"]
    curriculum, control = arms["curriculum"], arms["control"]
    assert [p["sets"] for p in curriculum["curve"][:3]] == [p["sets"] for p in control["curve"][:3]]
    assert curriculum["steps"] == control["steps"]
    assert curriculum["final"] != control["final"]


def test_rollouts_are_all_counted(finished: Finished):
    """An arm's rollouts are those of training and of selection, and the random run has at least as many in all."""
    arms = finished[1]["runs"][0]["arms"]
    train = 2 * 4 * 4
    for stage, select in zip(arms["curriculum"]["stages"], (0, 2 * 4 * 4, 2 * 4 * 4), strict=True):
        assert stage["rollouts"] == {"train": train, "select": select}
    assert arms["curriculum"]["rollouts"] == 3 * train + 2 * 2 * 4 * 4
    assert arms["control"]["rollouts"] == 3 * train
    assert 0 <= arms["random"]["rollouts"] - arms["curriculum"]["rollouts"] < 4 * 4
    for arm in arms.values():
        assert arm["curve"][-1]["rollouts"] == arm["rollouts"]


def test_a_finished_run_is_not_computed_again(finished: Finished, tiny: Config, monkeypatch: pytest.MonkeyPatch):
    """The same command on a finished directory stores nothing new, computes nothing, and leaves the same summary."""
    folder, summary = finished
    before = keys_of(folder)
    manifest = (folder / "export" / "manifest.json").read_bytes()
    for module, name in COMPUTED.items():
        monkeypatch.setattr(f"{module}.{name}", None)
    assert timeless(quiet(tiny, folder)) == timeless(summary)
    assert keys_of(folder) == before
    assert (folder / "export" / "manifest.json").read_bytes() == manifest


def test_order_and_sharding_change_nothing(settle: Settle, inputs: Path, tmp_path: Path):
    """Another order of the pool and other shards change neither the selection nor, beyond rounding, the level."""
    lines = (inputs / "pool.jsonl").read_text().splitlines(keepends=True)
    other = tmp_path / "reordered.jsonl"
    other.write_text("".join(lines[7:][::-1] + lines[:7]))
    pool = ({"path": str(other), "data_source": "tiny"},)
    one = quiet(settle(**SHORT), tmp_path / "one")
    two = quiet(settle(**SHORT, prompts={"pool": pool}, evidence={"shard": 3}), tmp_path / "two")
    for number in range(2):
        uids = [[row["prompt_uid"] for row in stage_of(tmp_path / name, number)] for name in ("one", "two")]
        assert uids[0] == uids[1]
    levels = [run["final"]["curriculum"]["test"]["expected_reward"]["mean"] for run in (one, two)]
    assert levels[0] == pytest.approx(levels[1], abs=1e-5)


def test_imported_rollouts_select_what_collected_ones_do(settle: Settle, tmp_path: Path):
    """Evidence that an earlier run collected selects, once imported, the same prompts in the same order."""
    few = {"controls": False, "train": {"stages": (1,)}}
    quiet(settle(**few, evidence={"source": "collect", "rollouts": 4}), tmp_path / "collected")
    store = open_store(tmp_path / "collected" / "store")
    pool = {row["prompt_uid"] for row in pq.read_table(tmp_path / "collected/export/selection.parquet").to_pylist()}
    shards = [key for key in store.catalog.keys("trajectories") if store.meta(key)["split"] == "pool"]
    names = ["prompt_uid", "prompt_ids", "completion_ids", "logp_old", "verdict", "step"]
    stored = store.trajectories.read(shards, names)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*stored.values(), strict=True)]
    rows = [row for row in rows if row.pop("step") == 0]  # those of training came later
    assert {row["prompt_uid"] for row in rows} == pool and len(rows) == 4 * 24
    stranger = rows[0] | {"prompt_uid": "of-another-pool"}
    pq.write_table(pa.Table.from_pylist([stranger, *rows]), tmp_path / "rollouts.parquet")

    summary = quiet(
        settle(**few, evidence={"source": "import", "path": str(tmp_path / "rollouts.parquet")}), tmp_path / "imported"
    )
    columns = ("prompt_uid", "rank", "reason", "pass_rate", "n_obs")
    selections = [
        pq.read_table(tmp_path / name / "export/selection.parquet", columns=list(columns)).to_pylist()
        for name in ("collected", "imported")
    ]
    assert selections[0] == selections[1]
    assert max(row["n_obs"] for row in selections[1]) == 4
    assert summary["runs"][0]["arms"]["curriculum"]["rollouts"] == 2 * 4 * 4 + 4 * 4  # imports cost this run nothing


def test_two_seeds_give_intervals(settle: Settle, tmp_path: Path):
    """Several seeds give every level and every paired difference a half width, and each seed its metrics."""
    config = settle(train={"stages": (1,)}, evaluate={"exact": False})
    summary = quiet(config, tmp_path / "run", seeds=[0, 1])
    assert summary["seeds"] == [0, 1] and len(summary["runs"]) == 2
    for level in (
        summary["final"]["curriculum"]["test"],
        summary["paired_differences"]["curriculum - random"]["late"]["test"],
    ):
        assert all(v["n"] == 2 and v["half_width"] >= 0 for v in level.values())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["seed"] for line in lines} == {0, 1}


def test_weights_that_are_off_are_reported_as_the_identity(settle: Settle, finished: Finished, tmp_path: Path):
    """With ``diem.strength = 0`` every stage is reported as plain GRPO; with it on, a stage with targets is not."""
    summary = quiet(settle(**SHORT, diem={"strength": 0.0}), tmp_path / "run")
    assert [s["diem_identity"] for s in summary["runs"][0]["arms"]["curriculum"]["stages"]] == [True, True]
    stages = finished[1]["runs"][0]["arms"]["curriculum"]["stages"]
    assert [s["diem_identity"] for s in stages] == [True, False, False]


def test_other_places_change_nothing(
    settle: Settle, postgres: Callable[[], str], bucket: Callable[[], str], tmp_path: Path
):
    """The same run with its catalog in PostgreSQL and its objects in S3, by URL alone, selects the same, byte for byte."""
    here, there = settle(**SHORT), settle(**SHORT, catalog=postgres(), objects=bucket())
    for name, config in (("here", here), ("there", there)):
        quiet(config, tmp_path / name)
    assert not (tmp_path / "there" / "store" / "catalog.sqlite").exists()
    for name in ("selection.parquet", "data/stage_01/train.parquet"):
        assert (tmp_path / "here/export" / name).read_bytes() == (tmp_path / "there/export" / name).read_bytes()
    again = open_store(tmp_path / "elsewhere", there.catalog, there.objects)
    assert all(verdict.wrong is None for verdict in verify(again))
    keys = again.catalog.keys()
    assert len(keys) > 10 and {key for key in keys if not key.startswith("settings")} <= keys_of(tmp_path / "here")
