"""The command line: quick to answer, honest in its exit code, the same when asked twice."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.cli import SINGLE, main
from flows.config import Config, recipes, to_toml
from tests.flows.killed import COMPUTED
from tests.flows.tiny import keys_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tiny: Config, tmp_path: Path) -> str:
    """The tiny settings as a file."""
    (tmp_path / "tiny.toml").write_text(to_toml(tiny))
    return str(tmp_path / "tiny.toml")


def answer(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """Run a command that must succeed, and return what it printed as JSON."""
    assert main([*argv, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return json.loads(printed.out)


def test_help_answers_at_once():
    """``influent --help`` takes less than half a second of the processor."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "flows.cli", "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.5


def test_help_imports_nothing_heavy():
    """``influent --help`` imports neither a model library, nor Prefect, nor even NumPy."""
    program = [sys.executable, "-X", "importtime", "-m", "flows.cli", "--help"]
    shown = subprocess.run(program, cwd=ROOT, check=True, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in shown.stderr.splitlines()}
    assert not imported & {"torch", "prefect", "numpy", "transformers", "pydantic", "rich"}
    assert all(name in shown.stdout for name in ("run", "verify", *SINGLE))


def test_the_command_is_installed():
    """The package installs ``influent``, which prints its version."""
    command = Path(sys.executable).with_name("influent")
    shown = subprocess.run([command, "--version"], check=True, capture_output=True, text=True)
    assert shown.stdout.strip().count(".") == 2


def test_usage_errors_are_2(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """No command, an unknown command, an unknown recipe or a wrong setting is 2, said on standard error alone."""
    assert main([]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["runn"])
    assert stopped.value.code == 2
    capsys.readouterr()
    assert main(["run", "embeded"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(name in printed.err for name in recipes())
    (tmp_path / "x.toml").write_text(
        'name = "x"\nsede = 1\npolicy.checkpoint = "embedded"\nprompts.source = "embedded"\n'
    )
    assert main(["select", str(tmp_path / "x.toml")]) == 2
    assert "'seed'" in capsys.readouterr().err


def test_failures_are_1(capsys: pytest.CaptureFixture[str], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What cannot be done is 1, with a line that names the thing, and no traceback."""
    monkeypatch.chdir(tmp_path)
    assert main(["status", "nowhere"]) == 1
    assert "'nowhere'" in capsys.readouterr().err
    assert main(["select", file, "--stage", "0"]) == 1
    assert "stage 0 is a shuffle" in capsys.readouterr().err
    assert main(["train", file, "--stage", "3"]) == 1
    assert "stages 0 to 2" in capsys.readouterr().err
    assert main(["import", file]) == 1
    assert "evidence.source" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_passwords_are_refused_and_not_repeated(capsys: pytest.CaptureFixture[str], file: str):
    """A database URL with a password is refused before it is written anywhere, and the message does not repeat it."""
    text = Path(file).read_text().replace('catalog = ""', 'catalog = "postgresql+psycopg://me:secret@host/x"')
    Path(file).write_text(text)
    assert main(["select", file]) == 2
    error = capsys.readouterr().err
    assert "catalog" in error and "PGPASSWORD" in error and "secret" not in error


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]):
    """``recipes`` prints the names, plainly and as JSON."""
    assert answer(capsys, "recipes") == {"recipes": recipes()}
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out == f"recipes: {', '.join(recipes())}\n"


def test_a_store_is_described_and_verified(capsys: pytest.CaptureFixture[str], begun: Path):
    """``status`` counts what the store holds, ``verify`` reads every file of it, ``gc`` deletes nothing that is new."""
    status = answer(capsys, "status", str(begun))
    assert {"policy", "prompts", "rollouts", "selection"} <= set(status)
    checked = answer(capsys, "verify", str(begun))
    assert checked["damaged"] == [] and checked["files"] > 10 and checked["MiB_per_second"] > 0
    assert answer(capsys, "gc", str(begun)) == {"objects": 0, "temporaries": 0}


def test_garbage_is_collected_after_its_grace_period(capsys: pytest.CaptureFixture[str], begun: Path):
    """``gc --grace 0`` deletes what nothing refers to, however young, and nothing else."""
    (begun / "store" / "tmp" / "half").write_bytes(b"written")
    assert answer(capsys, "gc", str(begun), "--grace", "1") == {"objects": 0, "temporaries": 0}
    assert answer(capsys, "gc", str(begun), "--grace", "0") == {"objects": 0, "temporaries": 1}
    assert answer(capsys, "verify", str(begun))["damaged"] == []
    assert main(["gc", str(begun), "--grace", "-1"]) == 1
    assert "grace" in capsys.readouterr().err


def test_stores_are_merged(capsys: pytest.CaptureFixture[str], begun: Path, finished: Any):
    """``merge`` copies what the other run directory has and this one lacks, once."""
    before = keys_of(begun)
    found = answer(capsys, "merge", str(begun), str(finished[0]))
    assert keys_of(begun) == before | keys_of(finished[0])
    assert found == {"copied": len(keys_of(begun)) - len(before), "present": len(keys_of(finished[0]) & before)}
    assert answer(capsys, "merge", str(begun), str(finished[0]))["copied"] == 0
    assert answer(capsys, "verify", str(begun))["damaged"] == []


def test_lineage_goes_back_to_policy_settings_and_code(capsys: pytest.CaptureFixture[str], finished: Any):
    """``lineage`` of a selection finds scores, gradients, rollouts and policy, the settings' key and the code's version."""
    folder = finished[0]
    manifest = json.loads((folder / "export" / "manifest.json").read_text())
    selection = manifest["stages"][-1]["selection"]
    found = answer(capsys, "lineage", str(folder), selection)
    assert {"selection", "scores", "gradients", "trajectories", "policy", "prompts"} <= {
        f["kind"] for f in found.values()
    }
    assert all(facts["kind"] for facts in found.values()), "every input is in the store"
    assert {tuple(facts["origin"]) for facts in found.values()} == {("code", "settings")}
    assert {key: manifest["lineage"][key]["inputs"] for key in found} == {k: f["inputs"] for k, f in found.items()}
    settings = found[selection]["origin"]["settings"]
    assert answer(capsys, "lineage", str(folder), settings)[settings]["kind"] == "settings"
    assert main(["lineage", str(folder), "selection-absent"]) == 1


def test_the_retired_go(capsys: pytest.CaptureFixture[str], begun: Path):
    """``retire`` hides a thing, ``gc`` removes it after its grace period, and what beliefs rest on stays."""
    key = next(key for key in sorted(keys_of(begun)) if key.startswith("evaluation-"))
    assert answer(capsys, "retire", str(begun), key) == {"retired": key}
    assert key not in keys_of(begun)
    answer(capsys, "gc", str(begun), "--grace", "0")
    assert main(["retire", str(begun), key]) == 1
    capsys.readouterr()
    rollouts = next(key for key in keys_of(begun) if key.startswith("rollouts-"))
    assert main(["retire", str(begun), rollouts]) == 1
    assert "beliefs" in capsys.readouterr().err


def test_a_damaged_catalog_is_3(capsys: pytest.CaptureFixture[str], begun: Path):
    """``verify`` exits 3 also when the catalog itself cannot be opened, and names it."""
    (begun / "store" / "catalog.sqlite").write_bytes(b"garbage" * 1000)
    assert main(["verify", str(begun), "--json"]) == 3
    (told,) = json.loads(capsys.readouterr().out)["damaged"]
    assert "catalog.sqlite" in told


def test_one_process_writes_to_a_run(capsys: pytest.CaptureFixture[str], begun: Path, file: str):
    """While another process goes on with a run, a second is refused, by the name of the first, and does nothing."""
    program = f"""
import sys, time
from pathlib import Path
from stores import open_store
with open_store(Path({str(begun / "store")!r})).hold("run", seconds=1.0):
    print("held", flush=True)
    time.sleep(60)
"""
    before = keys_of(begun)
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert main(["select", file, "--dir", str(begun)]) == 1
        assert f":{holder.pid}:" in capsys.readouterr().err
        assert keys_of(begun) == before
        holder.kill()


def test_damage_is_3(capsys: pytest.CaptureFixture[str], begun: Path):
    """``verify`` exits 3 when one byte of one stored file differs, and names the key and the file."""
    damaged = max((begun / "store" / "objects").glob("*/*"), key=lambda p: p.stat().st_size)
    os.chmod(damaged, 0o644)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    assert main(["verify", str(begun), "--json"]) == 3
    (told,) = json.loads(capsys.readouterr().out)["damaged"]
    assert told.startswith("policy-") and str(damaged) in told


def test_single_steps_hand_out_keys_and_are_done_once(
    capsys: pytest.CaptureFixture[str], begun: Path, file: str, monkeypatch: pytest.MonkeyPatch
):
    """Each single-step command prints the keys of what it made; asked again it prints the same and makes nothing."""
    printed = {}
    for command in ("train", "evaluate", "collect", "featurize", "score", "select"):
        printed[command] = answer(capsys, command, file, "--dir", str(begun))
        assert set(printed[command]["keys"]) <= keys_of(begun)
    before = keys_of(begun)
    for module, name in COMPUTED.items():
        monkeypatch.setattr(f"{module}.{name}", None)
    for command, result in printed.items():
        assert answer(capsys, command, file, "--dir", str(begun)) == result
    assert keys_of(begun) == before
    assert [printed[c]["stage"] for c in ("train", "evaluate", "collect", "select")] == [0, 0, 1, 1]
    kinds = {command: [key.rsplit("-", 1)[0] for key in result["keys"]] for command, result in printed.items()}
    assert kinds == {
        "train": ["policy"] * 2,  # a checkpoint a step
        "evaluate": ["evaluation"] * 2,
        "collect": ["rollouts"] * 2,  # of two validation sets
        "featurize": ["gradients"] * 3,  # and of the pool
        "score": ["scores"],
        "select": ["selection"],
    }


def test_a_single_step_trains_no_control(capsys: pytest.CaptureFixture[str], tiny: Config, tmp_path: Path):
    """Asked to train the only stage of a run, a command trains that stage and none of the controls."""
    one = tiny.model_copy(update={"train": tiny.train.model_copy(update={"stages": (1,)})})
    (tmp_path / "one.toml").write_text(to_toml(one))
    trained = answer(capsys, "train", str(tmp_path / "one.toml"), "--dir", str(tmp_path / "run"))
    assert len(trained["keys"]) == 1
    assert len([key for key in keys_of(tmp_path / "run") if key.startswith("policy-")]) == 2  # the start, and it


def test_a_plain_run_says_where_its_results_are(
    capsys: pytest.CaptureFixture[str], finished: tuple[Path, dict[str, Any]], file: str
):
    """``run --no-prefect`` prints where summary, export and report are; progress goes to standard error."""
    folder, _ = finished
    assert main(["run", file, "--no-prefect", "--dir", str(folder)]) == 0
    printed = capsys.readouterr()
    assert dict(line.split(": ") for line in printed.out.splitlines()) == {
        "summary": str(folder / "summary.json"),
        "export": str(folder / "export"),
        "report": str(folder / "report.html"),
    }
    assert "on the test set, at the end" in printed.err
