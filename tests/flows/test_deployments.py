"""What a schedule does, on a real Prefect server with a work pool and a worker: runs, limits, the gate, the windows."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import Config, load_config, to_toml
from flows.server import QUIET
from tests.servers import Prefect, free_port

ROOT = Path(__file__).parents[2]
FILE = ROOT / "flows" / "prefect.yaml"
SECRETS = {
    "OPENAI_API_KEY": "sk-do-not-tell-1",
    "PGPASSWORD": "do-not-tell-2",
    "AWS_SECRET_ACCESS_KEY": "do-not-tell-3",
}
GATE = """
import json, sys
from flows.config import load_config
from flows.orchestration import tasks
from prefect import flow
from prefect.client.orchestration import get_client
from stores.errors import Conflict, Unreachable

config = load_config(sys.argv[1])
cuda = config.model_copy(update={"policy": config.policy.model_copy(update={"device": "cuda"})})
seen, tried = {}, []

def slots():
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name("gpu").active_slots

def failing(error):
    def step():
        tried.append(error.__name__)
        raise error("no")
    return step

@flow(persist_result=False)
def steps():
    for device, settings in (("cpu", config), ("cuda", cuda)):
        for name in ("train", "score"):
            seen[f"{name} {device}"] = tasks(settings)(name, slots)()
    for error in (Unreachable, Conflict):
        try:
            tasks(config)("collect", failing(error))()
        except Exception as raised:
            assert type(raised) is error
    return None

import flows.orchestration
flows.orchestration.WAITS = (0.0, 0.0)
steps()
print(json.dumps([seen, tried]))
"""


def influent(prefect: Prefect, *argv: object, cwd: Path = ROOT) -> str:
    """What a command prints that must succeed."""
    command = [sys.executable, "-m", "flows.cli", *map(str, argv)]
    ended = subprocess.run(command, env=prefect.environment, cwd=cwd, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_file_names_flows_and_their_parameters():
    """Each deployment of prefect.yaml names a flow of ours, parameters that it has, a limit, and a quiet environment."""
    for spec in yaml.safe_load(FILE.read_text())["deployments"]:
        place, _, name = spec["entrypoint"].partition(":")
        flow = getattr(import_module(place.removesuffix(".py").replace("/", ".")), name)
        given = {*spec["parameters"], *(p for trigger in spec.get("triggers", ()) for p in trigger["parameters"])}
        assert given <= set(inspect.signature(flow.fn).parameters)
        assert spec["concurrency_limit"]["limit"] == 1
        assert QUIET.items() <= spec["work_pool"]["job_variables"]["env"].items()
        assert all(len(schedule["cron"].split()) == 5 for schedule in spec.get("schedules", ()))
    assert (ROOT / "prefect.yaml").resolve() == FILE


def registered(prefect: Prefect) -> dict[str, Any]:
    """All that a deploy makes, without what a clock said."""
    found = {
        path: prefect.ask("POST", f"/{path}/filter", {})
        for path in ("deployments", "automations", "work_pools", "v2/concurrency_limits")
    }
    return {
        path: sorted((row["id"], row["name"], row.get("parameters"), row.get("limit")) for row in rows)
        for path, rows in found.items()
    }


def test_deploying_twice_changes_nothing(prefect: Prefect, tiny: Config, tmp_path: Path):
    """A second deploy registers the same things under the same ids, but for triggers, which are as many."""
    (tmp_path / "tiny.toml").write_text(to_toml(tiny))
    made = []
    for _ in range(2):
        influent(prefect, "deploy", tmp_path / "tiny.toml", "--dir", tmp_path / "run")
        made.append(registered(prefect))
    assert {row[1] for row in made[0]["deployments"]} >= {"nightly", "on-checkpoint", "stages", "on-stage", "weekly"}
    automations = [sorted(name for _, name, *_ in state.pop("automations")) for state in made]
    assert automations[0] == automations[1]
    assert made[0] == made[1]


def test_prefect_reads_the_file_itself(prefect: Prefect):
    """``prefect deploy --all`` in a checkout registers the same deployments, with the embedded default."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    ended = subprocess.run(command, env=prefect.environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for spec in yaml.safe_load(FILE.read_text())["deployments"]:
        name = spec["entrypoint"].rpartition(":")[2]
        found = prefect.ask("GET", f"/deployments/name/{name}/{spec['name']}")
        assert found["parameters"] == spec["parameters"]


def test_an_accelerator_is_held_while_it_computes(prefect: Prefect, tiny: Config, tmp_path: Path):
    """The limit ``gpu`` is held by a step that computes on one, and by no other; an outage is tried again, no mistake."""
    (tmp_path / "tiny.toml").write_text(to_toml(tiny))
    influent(prefect, "deploy", tmp_path / "tiny.toml", "--dir", tmp_path / "run", "--gpus", 1)
    command = [sys.executable, "-c", GATE, str(tmp_path / "tiny.toml")]
    ended = subprocess.run(command, env=prefect.environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    seen, tried = json.loads(ended.stdout.splitlines()[-1])
    assert seen == {"train cpu": 0, "score cpu": 0, "train cuda": 1, "score cuda": 0}
    assert tried == ["Unreachable"] * 3 + ["Conflict"]


@pytest.mark.timeout(600)
def test_the_embedded_default_on_a_schedule(prefect: Prefect, tmp_path: Path):
    """A scheduled run waits at each gate for a person; one beside it is held by the limit; all is seen over the API."""
    embedded = load_config("embedded")
    train = embedded.train.model_copy(update={"stages": embedded.train.stages[:3]})
    gated = {"controls": False, "release": {"approval": True}, "train": train.model_dump()}
    config = Config.model_validate(embedded.model_dump() | gated)
    (tmp_path / "embedded.toml").write_text(to_toml(config))
    folder, log = tmp_path / "run", tmp_path / "worker.log"
    influent(prefect, "deploy", tmp_path / "embedded.toml", "--dir", folder)
    with prefect.worker("influent", log, **SECRETS):
        first = prefect.start("curriculum/stages")
        prefect.wait(first, "Running")
        second = prefect.start("curriculum/stages")
        assert prefect.wait(second, "AwaitingConcurrencySlot") and prefect.state(first)[0] == "Running"
        prefect.wait(first, "Suspended")
        assert prefect.wait(second, "Waits"), "the second comes to the same gate, and leaves it to the first"
        (said,) = (folder / "waiting").glob("*.json")
        assert json.loads(said.read_text())["flow_run"] == first
        form = {"run_input": {"approve": True, "by": "ann", "note": "on the page"}}
        assert prefect.ask("POST", f"/flow_runs/{first}/resume", form)["status"] == "ACCEPT"
        prefect.wait(first, "Running")
        prefect.wait(first, "Suspended")
        assert json.loads(influent(prefect, "approve", folder, "--by", "bob", "--json"))["by"] == "bob"
        prefect.wait(first, "Completed")
        _wait_for_exports(prefect, stages=3)
    summary = json.loads((folder / "summary.json").read_text())
    _check_windows(prefect, folder, summary)
    stages = summary["runs"][0]["arms"]["curriculum"]["stages"]
    assert [stage["steps"] for stage in stages] == list(train.stages)
    told = [log, *(p for place in (folder, prefect.home) for p in place.rglob("*") if p.is_file())]
    assert not [p for p in told if any(secret.encode() in p.read_bytes() for secret in SECRETS.values())]


def _wait_for_exports(prefect: Prefect, stages: int) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        runs = prefect.ask("POST", "/flow_runs/filter", {"flows": {"name": {"any_": ["export"]}}})
        if sum(run["state"]["name"] == "Completed" for run in runs) == stages:
            return
        time.sleep(1)
    raise TimeoutError([run["state"] for run in runs])


def _check_windows(prefect: Prefect, folder: Path, summary: dict[str, Any]) -> None:
    artifacts = prefect.ask("POST", "/artifacts/filter", {"limit": 200})
    by_key = {a["key"]: a for a in artifacts if a["key"] and a["key"].startswith("demo-")}
    level = summary["final"]["curriculum"]["test"]["expected_reward"]["mean"]
    page = by_key["demo-result"]["data"]
    assert f"curriculum, test, expected reward: `{level:.3f}`" in page
    assert (folder / "report.html").as_uri() in page and len(page.splitlines()) < 20
    rows = json.loads(by_key["demo-seed-20-stage-02-prompts"]["data"])
    assert 0 < len(rows) <= 100 and rows[0]["rank"] == 0 and not {"prompt", "completion"} & rows[0].keys()
    assert {"progress"} <= {a["type"] for a in artifacts}
    events = prefect.ask(
        "POST", "/events/filter", {"filter": {"event": {"prefix": ["influent.", "prefect.asset.mat"]}}}
    )
    names = [event["event"] for event in events["events"]]
    assert names.count("influent.selection.released") == names.count("influent.stage.finished") == 3
    assert names.count("prefect.asset.materialization.succeeded") == 3


def test_a_checkpoint_starts_a_curation(prefect: Prefect, inputs: Path, tiny: Config, tmp_path: Path):
    """A checkpoint that is announced is curated for, without anybody asking; the export is a data set."""
    from datasets import load_dataset

    (tmp_path / "tiny.toml").write_text(to_toml(tiny))
    folder = tmp_path / "run"
    influent(prefect, "deploy", tmp_path / "tiny.toml", "--dir", folder)
    with prefect.worker("influent", tmp_path / "worker.log"):
        influent(prefect, "announce", inputs / "checkpoint")
        until = time.monotonic() + 120
        while not (folder / "export" / "manifest.json").is_file() and time.monotonic() < until:
            time.sleep(0.5)
        runs = prefect.ask("POST", "/flow_runs/filter", {"flows": {"name": {"any_": ["curate"]}}})
        mine = [run for run in runs if run["parameters"].get("directory") == str(folder)]
        assert [run["parameters"]["checkpoint"] for run in mine] == [str(inputs / "checkpoint")]
        prefect.wait(mine[0]["id"], "Completed")
        assert prefect.wait(prefect.start("maintain/weekly"), "Completed")
    assert len(load_dataset(str(folder / "export"), "stage_00", cache_dir=str(tmp_path / "cache"))["train"]) == 8


def test_the_quick_start_serves_until_it_is_stopped(tiny: Config, tmp_path: Path):
    """``influent serve`` brings a server on loopback, runs its deployment, and leaves nothing running when stopped."""
    (tmp_path / "tiny.toml").write_text(to_toml(tiny))
    port = free_port()
    here = Prefect(f"http://127.0.0.1:{port}/api", tmp_path)
    environment = {k: v for k, v in here.environment.items() if k not in ("PREFECT_API_URL", "PREFECT_HOME")}
    command = [sys.executable, "-m", "flows.cli", "serve", str(tmp_path / "tiny.toml"), "--port", str(port)]
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as serving:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                run = here.start("curate/served")
                break
            except OSError:
                assert serving.poll() is None, serving.stderr.read()
                time.sleep(0.5)
        here.wait(run, "Completed")
        time.sleep(5)  # the process of the run ends a little after the run
        serving.send_signal(signal.SIGINT)
        _, said = serving.communicate(timeout=60)
    assert f"http://127.0.0.1:{port}" in said and "Traceback" not in said
    with pytest.raises(OSError, match="refused"):
        here.ask("GET", "/health")
    assert (tmp_path / "runs" / "prefect" / "prefect.db").is_file()
    assert (tmp_path / "runs" / "tiny" / "export" / "manifest.json").is_file()


def test_commands_that_need_a_server_say_which(tiny: Config, tmp_path: Path):
    """Without PREFECT_API_URL, or where nobody answers there, a command fails with the remedy."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    for argv in (["deploy", "embedded"], ["announce", "x"]):
        command = [sys.executable, "-m", "flows.cli", *argv]
        ended = subprocess.run(
            command, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True
        )
        assert ended.returncode == 1 and "PREFECT_API_URL is not set" in ended.stderr
    nobody = environment | {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    command = [sys.executable, "-m", "flows.cli", "announce", "x"]
    ended = subprocess.run(
        command, env=nobody | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1 and "is the server running?" in ended.stderr, "an event that is lost is no success"
