"""Bundles: what leaves is whole, named, checksummed, and read by `datasets` without a network."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stores import disk
from stores.bundles import SCHEMA, write_bundle

SELECTION = {"prompt_uid": ["a", "b"], "stage": [0, None], "reason": ["selected", "budget"], "score": [0.5, None]}


def _stage(number: int, rows: int = 2) -> dict[str, list[Any]]:
    return {
        "prompt_uid": [f"prompt-{number}-{row}" for row in range(rows)],
        "prompt": [[{"role": "user", "content": f"{row}+1? é"}] for row in range(rows)],
        "solution": ["1"] * rows,
        "ground_truth": ["1"] * rows,
        "data_source": ["sums"] * rows,
        "ability": ["math"] * rows,
        "reward_spec": [json.dumps({"style": "rule"})] * rows,
        "stage": [number] * rows,
        "rank": list(range(rows)),
        "score_wmi": [None, *[0.25] * (rows - 1)][:rows],
        "n_obs": [8] * rows,
        "policy_id": ["policy-0"] * rows,
    }


def _write(folder: Path, number_of_stages: int = 2, **change: Any) -> None:
    arguments: dict[str, Any] = {
        "stages": [_stage(number) for number in range(number_of_stages)],
        "controls": [_stage(number) for number in range(number_of_stages)],
        "selection": SELECTION,
        "manifest": {"run": "demo"},
        "card": "# A card\n",
    }
    write_bundle(folder, **(arguments | change))


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_has_its_files_and_their_digests(tmp_path: Path) -> None:
    """The manifest keeps what it was given and lists every other file with SHA-256, size and rows."""
    _write(tmp_path / "export")
    manifest = json.loads((tmp_path / "export" / "manifest.json").read_text())
    assert manifest["run"] == "demo"
    assert manifest["files"].keys() == _files(tmp_path / "export") - {"manifest.json"}
    assert manifest["files"].keys() == {
        *("README.md", "selection.parquet"),
        *(f"{kind}/stage_{number:02d}/train.parquet" for kind in ("data", "control") for number in range(2)),
    }
    for name, entry in manifest["files"].items():
        data = (tmp_path / "export" / name).read_bytes()
        assert (entry["sha256"], entry["size"]) == (hashlib.sha256(data).hexdigest(), len(data))
        assert entry.get("rows") == (2 if name.endswith(".parquet") else None)
    assert list(tmp_path.iterdir()) == [tmp_path / "export"]


def test_all_stages_have_one_schema(tmp_path: Path) -> None:
    """Stages and controls, with columns of None only or without rows, have the same columns and types."""
    _write(tmp_path / "export", number_of_stages=1, controls=[_stage(0, rows=0)])
    schemas = [pq.read_schema(path) for path in (tmp_path / "export").glob("*/*/*.parquet")]
    assert len(schemas) == 2
    for schema in schemas:
        assert {name: schema.field(name).type for name in schema.names} == SCHEMA
        assert schema.names == list(SCHEMA)


def test_datasets_reads_a_bundle_offline(tmp_path: Path) -> None:
    """`datasets.load_dataset(folder, "stage_00")` gives the stage, and no name gives the first, without a network."""
    _write(tmp_path / "export")
    code = (
        "import json, sys; from datasets import load_dataset\n"
        "folder = sys.argv[1]\n"
        "print(json.dumps([load_dataset(folder, *name, split='train').to_dict()"
        " for name in ((), ('stage_01',), ('control_00',))]))"
    )
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code, str(tmp_path / "export")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | home, check=True)
    first, second, control = json.loads(done.stdout.splitlines()[-1])
    assert first == control == {name: _stage(0).get(name, [None, None]) for name in SCHEMA}
    assert second["prompt_uid"] == _stage(1)["prompt_uid"]


def test_the_same_bundle_is_the_same_bytes(tmp_path: Path) -> None:
    """Writing a bundle twice gives the same manifest, byte for byte."""
    _write(tmp_path / "one"), _write(tmp_path / "two")
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()


def test_a_bundle_replaces_a_bundle(tmp_path: Path) -> None:
    """Nothing of the bundle that was there is left."""
    _write(tmp_path / "export", number_of_stages=3)
    _write(tmp_path / "export", number_of_stages=1)
    assert not (tmp_path / "export" / "data" / "stage_01").exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "export"]


def test_a_folder_of_other_files_is_kept(tmp_path: Path) -> None:
    """A folder that is not a bundle is not replaced; an empty one is."""
    (tmp_path / "export").mkdir()
    _write(tmp_path / "export")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="no bundle"):
        _write(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_every_interrupted_bundle_leaves_the_last(
    tmp_path: Path, fail_at: Callable[[int], AbstractContextManager[None]]
) -> None:
    """Whichever disk operation fails, a whole bundle is there: the old one, or the new one when only its name was
    not yet durable; and no temporary is."""
    folder, failures = tmp_path / "export", 0
    _write(folder, number_of_stages=1)
    old = (folder / "manifest.json").read_bytes()
    while True:
        try:
            with fail_at(failures + 1):
                _write(folder, number_of_stages=2)
            break
        except OSError as error:
            failures += 1
            assert "No space left on device" in str(error) and "repeat the step" in str(error)
        manifest = (folder / "manifest.json").read_bytes()
        files = json.loads(manifest)["files"]
        assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == files[name]["sha256"] for name in files)
        assert list(tmp_path.iterdir()) == [folder]
        assert manifest == old or failures > 20
    assert failures > 20
    assert len(list((folder / "data").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "stages is empty"),
        ({"stages": [{"prompt_uid": ["a"]}]}, "data stage 0 lacks .*'prompt'"),
        ({"stages": [_stage(0) | {"extra": [1, 2]}]}, "unknown.*'extra'"),
        ({"stages": [_stage(0), _stage(1) | {"solution": ["1", None]}]}, "data stage 1 has None in 'solution'"),
        ({"stages": [_stage(0) | {"reward_spec": [{}, {}]}]}, "'reward_spec'"),
        ({"controls": [_stage(0) | {"rank": ["a", "b"]}]}, "'rank'"),
        ({"selection": SELECTION | {"text": ["x", "y"]}}, "text columns"),
        ({"manifest": {"files": {}}}, "'files'"),
        ({"manifest": {"rate": float("nan")}}, r"manifest\['rate'\]"),
    ],
)
def test_bundles_that_make_no_sense_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """A missing, unknown or ill-typed column, text in the selection, or a bad manifest: refused, nothing written."""
    with pytest.raises(ValueError, match=message):
        _write(tmp_path / "export", **change)
    assert not list(tmp_path.iterdir())


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No manifest, no bundle: it is the last file to be created."""
    created: list[str] = []
    create = disk.create
    monkeypatch.setattr(disk, "create", lambda path, mode: (created.append(path.name), create(path, mode))[1])
    _write(tmp_path / "export")
    assert created[-1] == "manifest.json" and len(created) == 7
