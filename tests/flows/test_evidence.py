"""What a selection rests on: pooled rollouts of many policies, collected anew where they went stale, filtered first."""

from collections import Counter
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from flows import evidence
from flows.config import Config, ConfigError, load_config, to_toml
from flows.progress import Reporter
from flows.run import open_desk
from stores import open_store
from tests.flows.killed import COMPUTED
from tests.flows.test_run import Finished, Settle
from tests.flows.tiny import keys_of, quiet, timeless

REFRESHED = {"controls": False, "train": {"stages": (1, 1)}, "evidence": {"refresh": 16.0, "rollouts": 3}}


@pytest.fixture(scope="module")
def renewed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, dict[str, Any]]:
    """A run whose every candidate counts as stale, because 16 effective rollouts of 4 are asked for."""
    from tests.flows.tiny import configure

    folder = tmp_path_factory.mktemp("renewed")
    config = configure(inputs, folder, **REFRESHED)
    return config, folder / "run", quiet(config, folder / "run")


def shards(folder: Path, **facts: Any) -> list[str]:
    store = open_store(folder / "store")
    return [key for key in store.catalog.keys("trajectories") if facts.items() <= store.meta(key).items()]


def test_stale_prompts_are_collected_anew_and_counted(renewed: tuple[Config, Path, dict[str, Any]]):
    """Exactly the candidates get 3 rollouts each of the policy at the stage's start, and they count as spent."""
    _, folder, summary = renewed
    curriculum = summary["runs"][0]["arms"]["curriculum"]
    stage, store = curriculum["stages"][1], open_store(folder / "store")
    left = stage["cascade"]["prompts_left"]
    assert 0 < left < 24
    assert stage["refreshed"] == 3 * left
    assert stage["rollouts"]["select"] == 2 * 4 * 4 + 3 * left
    assert curriculum["rollouts"] == 2 * 4 * 4 + stage["rollouts"]["select"]
    rows = pq.read_table(folder / "export" / "selection.parquet").to_pylist()
    candidates = {r["prompt_uid"] for r in rows if r["stage"] == 1 and r["score_influence"] is not None}
    made = [key for key in shards(folder, split="pool") if set(store.trajectories.read([key], ["step"])["step"]) == {0}]
    rollouts = store.trajectories.read(made, ["prompt_uid", "policy"])
    assert Counter(rollouts["prompt_uid"]) == dict.fromkeys(candidates, 3)
    (policy,) = set(rollouts["policy"])
    assert "optimizer.safetensors" in store.get(policy).files  # the trained one, not the one that the run began with


def test_what_was_collected_anew_is_not_collected_again(
    renewed: tuple[Config, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    """The same command finds its stale prompts and their new rollouts by key, and computes nothing."""
    config, folder, summary = renewed
    before = keys_of(folder)
    for module, name in (*COMPUTED.items(), ("pipeline.staleness", "measure")):
        monkeypatch.setattr(f"{module}.{name}", None)
    assert timeless(quiet(config, folder)) == timeless(summary)
    assert keys_of(folder) == before


def test_nothing_is_collected_anew_by_default(finished: Finished):
    """Without ``evidence.refresh`` no stage asks for more rollouts of the pool than training makes."""
    folder, summary = finished
    assert [s["refreshed"] for s in summary["runs"][0]["arms"]["curriculum"]["stages"]] == [0, 0, 0]
    steps = open_store(folder / "store").trajectories.read(shards(folder, split="pool"), ["step"])["step"]
    assert min(steps) > 0


def test_a_selection_says_how_stale_its_evidence_was(renewed: tuple[Config, Path, dict[str, Any]]):
    """Every scored prompt has its share of effective rollouts and its largest ratios; no other has any."""
    rows = [r for r in pq.read_table(renewed[1] / "export" / "selection.parquet").to_pylist() if r["stage"] == 1]
    scored = [r for r in rows if r["score_influence"] is not None]
    assert scored and all(0 < r["ess"] <= 1 and r["log_ratio_p99"] >= 0 for r in scored)
    assert max(r["log_ratio_p99"] for r in scored) > 0  # the policy moved between the two stages
    assert all(r["ess"] is None and r["log_ratio_p99"] is None for r in rows if r["score_influence"] is None)


def test_evidence_is_the_latest_of_every_policy(finished: Finished, settle: Settle, tmp_path: Path):
    """A prompt's evidence pools rollouts of several policies, oldest first, each with its own log-probabilities."""
    folder = copytree(finished[0], tmp_path / "copy")  # opening it under other settings writes them down
    store = open_store(folder / "store")
    keys = [store.meta(k)["rollouts_key"] for k in store.catalog.keys("policy") if "rollouts_key" in store.meta(k)]
    columns = store.trajectories.read(keys, ["prompt_uid", "policy", "logp_old"])
    uids = list(dict.fromkeys(columns["prompt_uid"]))
    with open_desk(settle(evidence={"recent": 6}), folder, Reporter(quiet=True)) as desk:
        pooled = evidence.read_rollouts_of(desk, keys, uids)
    mixed = 0
    for uid, rows in pooled.groups().items():
        every = [i for i, u in enumerate(columns["prompt_uid"]) if u == uid]
        assert len(rows) == min(6, len(every))
        for mine, theirs in zip(rows, every[-6:], strict=True):
            assert pooled.policy[mine] == columns["policy"][theirs]
            assert np.array_equal(pooled.logp_old[mine], columns["logp_old"][theirs])
        mixed += len({pooled.policy[i] for i in rows}) > 1
    assert mixed > 0


def test_the_cascade_says_what_it_saves(finished: Finished, settle: Settle, tmp_path: Path):
    """Prompts and stored tokens are each left out for one reason or left in, and a smaller share leaves out more."""
    folder, summary = copytree(finished[0], tmp_path / "copy"), finished[1]
    stages = summary["runs"][0]["arms"]["curriculum"]["stages"]
    assert stages[0]["cascade"] == {}  # a shuffle filters nothing
    store = open_store(folder / "store")
    keys = [store.meta(k)["rollouts_key"] for k in store.catalog.keys("policy") if "rollouts_key" in store.meta(k)]
    (data,) = store.catalog.keys("prompts")
    tokens = sum(map(len, store.trajectories.read(keys, ["completion_ids"])["completion_ids"]))
    found = {}
    for share in (1.0, 0.25):
        changes = {"select": {"candidates": share}, "evidence": {"recent": 10**6}}
        with open_desk(settle(**changes), folder, Reporter(quiet=True)) as desk:
            found[share] = evidence.cascade(desk, data, keys)
    for cascade in found.values():
        facts = cascade.facts
        assert sum(facts["prompts"].values()) + facts["prompts_left"] == 24
        assert sum(facts["tokens"].values()) + facts["tokens_left"] == tokens
        assert facts["tokens"].get("unseen", 0) == 0
    assert "prior" not in found[1.0].facts["prompts"]
    assert found[0.25].facts["prompts_left"] == 6
    assert found[0.25].left_tokens < found[1.0].left_tokens


def test_more_effective_rollouts_than_are_kept_are_refused(tiny: Config, tmp_path: Path):
    """``evidence.refresh`` above ``evidence.recent`` would call every prompt stale at every stage."""
    file = tmp_path / "run.toml"
    file.write_text(to_toml(tiny).replace("refresh = 0.0", "refresh = 33.0"))
    with pytest.raises(ConfigError, match=r"evidence.refresh = 33 with evidence.recent = 32.*at most recent"):
        load_config(file)
