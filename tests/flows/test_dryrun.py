"""The dry run: what it says is what a run then takes, and saying it starts nothing."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from flows.cli import main
from flows.config import Config, load_config, to_toml
from flows.dryrun import estimate, fitted, tell
from flows.progress import Reporter
from flows.run import open_desk
from stores import open_store
from tests.flows.test_run import Finished
from tests.flows.tiny import quiet

TOKENS = 2.0  # the tokens of a run are at most what is said, and at least this part of it
DISK = 1.25  # the bytes of checkpoints, rollouts and gradients agree to this factor


def said(found: dict[str, Any], what: str, *steps: str) -> dict[str, float]:
    """Sum a column of the estimate by arm."""
    sums: dict[str, float] = defaultdict(float)
    for line in found["steps"]:
        if line["step"] in steps:
            sums[line["arm"]] += line[what]
    return sums


def stored(folder: Path) -> tuple[int, int]:
    """Return the tokens of all stored rollouts, and the bytes of all objects."""
    store = open_store(folder / "store")
    rollouts = store.trajectories.read(store.catalog.keys("trajectories"), ["completion_ids"])["completion_ids"]
    return sum(map(len, rollouts)), sum(
        p.stat().st_size for p in (folder / "store" / "objects").rglob("*") if p.is_file()
    )


def compare(found: dict[str, Any], summary: dict[str, Any], folder: Path, *, shared: int = 0) -> dict[str, float]:
    """Hold an estimate against the run, and return the ratios of what was said to what was taken."""
    sampling = ("collect", "refresh", "train")
    rollouts = said(found, "rollouts", *sampling)
    assert rollouts == {name: arm["rollouts"] for name, arm in summary["runs"][0]["arms"].items()}
    tokens, size = stored(folder)
    promised = sum(said(found, "sampled", *sampling).values())
    ratios = {"tokens": promised / tokens, "disk": found["total"]["disk"] / size}
    assert 1.0 <= ratios["tokens"] <= TOKENS, ratios
    assert 1 / DISK <= ratios["disk"] <= DISK, ratios
    return ratios


def test_a_run_takes_what_was_said(settle: Callable[..., Config], tmp_path: Path):
    """A run without shared steps takes the rollouts that were said, to one, and tokens and bytes within the factors."""
    config = settle(controls=False)
    compare(estimate(config), quiet(config, tmp_path / "run"), tmp_path / "run")


def test_the_arms_of_a_run_take_what_was_said(finished: Finished, tiny: Config):
    """Each arm of a run with controls takes the rollouts that were said for it."""
    rollouts = said(estimate(tiny), "rollouts", "collect", "refresh", "train")
    assert rollouts == {name: arm["rollouts"] for name, arm in finished[1]["runs"][0]["arms"].items()}


def test_the_embedded_recipe_takes_what_was_said(tmp_path: Path):
    """The embedded recipe, some steps of it, takes tokens and disk within the factors."""
    config = load_config("embedded")
    train = config.train.model_copy(update={"stages": (4, 4), "save_every": 2})
    config = config.model_copy(update={"train": train, "controls": False})
    compare(estimate(config), quiet(config, tmp_path / "run"), tmp_path / "run")


def test_collected_evidence_is_counted(settle: Callable[..., Config], tmp_path: Path):
    """Collecting the pool, and collecting anew what went stale, are steps with their rollouts."""
    config = settle(controls=False, evidence={"source": "collect", "rollouts": 3, "refresh": 2.0})
    found = estimate(config)
    assert said(found, "rollouts", "collect")["curriculum"] == 24 * 3 + 3 * 8 * 4
    assert said(found, "rollouts", "refresh")["curriculum"] == 3 * 24 * 3


def test_a_dry_run_starts_nothing_and_reads_no_weights(
    inputs: Path,
    settle: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Without a weight on disk the estimate is the same; no directory is made; a table goes to standard error."""
    config = settle()
    bare = copytree(inputs / "checkpoint", tmp_path / "bare")
    (bare / "model.safetensors").write_bytes(b"")
    other = config.model_copy(update={"policy": config.policy.model_copy(update={"checkpoint": str(bare)})})
    (tmp_path / "x.toml").write_text(to_toml(other))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", "x.toml", "--dry-run", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    counted = [{k: v for k, v in line.items() if k != "seconds"} for line in json.loads(printed.out)["steps"]]
    expected = [{k: v for k, v in line.items() if k != "seconds"} for line in estimate(config)["steps"]]
    assert counted == expected
    assert main(["run", "x.toml", "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert "nothing is started" in printed.err and "featurize" in printed.err
    assert "rollouts: " in printed.out and "seconds: " in printed.out
    assert sorted(tmp_path.rglob("*")) == before


def test_expectations_can_be_given(settle: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A completion's expected length and a device's rate replace what is assumed; alone they mean nothing."""
    config = settle()
    most, half = estimate(config, tflops=1e-6), estimate(config, completion_tokens=2.0, tflops=1e-6)
    assert half["total"]["sampled"] == most["total"]["sampled"] / 2
    assert half["total"]["seconds"] < most["total"]["seconds"]
    assert "1e-06 TFLOP/s as given" in most["device"]["source"]
    (tmp_path / "x.toml").write_text(to_toml(config))
    assert main(["run", str(tmp_path / "x.toml"), "--tflops", "3"]) == 1
    assert "--dry-run" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_assumed_and_said(settle: Callable[..., Config]):
    """For a device that this machine has not, the estimate says which one it assumes."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    config = settle(policy={"device": "cuda", "dtype": "bfloat16"})
    found = estimate(config)
    assert "assumed, as 'cuda' is not at hand: an A100" in found["device"]["source"]
    assert found["policy"]["itemsize"] == 2


def test_what_does_not_fit_is_said(settle: Callable[..., Config], capsys: pytest.CaptureFixture[str]):
    """Where a step needs more memory than the device has, the table says so, with what would help."""
    found = estimate(settle())
    tell(Reporter(), found, 1)
    assert "too much" not in capsys.readouterr().err
    found["device"]["memory"] = found["total"]["memory"] / 2
    tell(Reporter(), found, 1)
    assert "too much for 'cpu'" in capsys.readouterr().err


def test_a_memory_budget_lowers_the_token_budgets(settle: Callable[..., Config], tmp_path: Path):
    """With little memory a run holds fewer tokens at once, by the estimate; without a budget nothing changes."""
    assert fitted(settle()) == settle()
    config = settle(policy={"memory_gib": 0.01})
    with open_desk(config, tmp_path / "run", Reporter(quiet=True)) as desk:
        policy = desk.config.policy
    assert 0 < policy.micro_tokens < 16_384 and 0 < policy.batch_tokens <= 16_384
    assert load_config(tmp_path / "run" / "config.toml") == config
    held = [x["memory"] for x in estimate(config)["steps"] if x["step"] == "train"]
    assert np.max(held) < 0.02 * 2**30
    with pytest.raises(ValueError, match=r"policy\.memory_gib = 0\.0 is too little.*use LoRA"):
        fitted(settle(policy={"memory_gib": 0.001}))


def test_less_memory_changes_no_result(settle: Callable[..., Config], tmp_path: Path):
    """A run within a memory budget, its blocks computed twice, ends where the same run without them ends."""
    short = {"controls": False, "train": {"stages": (1, 1)}}
    ends = []
    for name, policy in (("plain", {}), ("less", {"memory_gib": 0.01, "checkpointing": True})):
        summary = quiet(settle(**short, policy=policy), tmp_path / name)
        ends.append(summary["final"]["curriculum"]["test"]["expected_reward"]["mean"])
    assert ends[1] == pytest.approx(ends[0], abs=1e-4)


def test_full_gradients_and_vllm_are_counted(settle: Callable[..., Config]):
    """Gradients of all parameters are a line of the first stage; vLLM's weights and its cache are held beside all."""
    lora = {"rank": 2, "alpha": 4, "targets": "all-linear"}
    plain = settle(policy={"lora": lora}, evidence={"source": "collect"})
    without = estimate(plain, tflops=1.0)
    found = estimate(plain.model_copy(update={"features": plain.features.model_copy(update={"compare_full": True})}))
    assert not said(without, "computed", "score_full")
    (line,) = [x for x in found["steps"] if x["step"] == "score_full"]
    same = next(x for x in found["steps"] if x["step"] == "featurize")
    assert line["stage"] == 0 and line["computed"] == same["computed"] > 0 and line["seconds"] > same["seconds"]
    engine = estimate(settle(**plain.model_dump(include={"policy", "evidence"}), generation={"engine": "vllm"}))
    shape = engine["policy"]
    bare = shape["parameters"] - shape["trainable"]  # the embedded policy's output layer is its own
    more = 4 * bare + 2**30
    for line, other in zip(engine["steps"], without["steps"], strict=True):
        if line["step"] == "featurize":
            assert line["memory"] == pytest.approx(other["memory"] + more)
        if line["step"] == "collect":
            assert line["memory"] == pytest.approx(4 * shape["parameters"] + more)
