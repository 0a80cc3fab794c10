"""Another verifier for rollouts that are stored: new verdicts and new counts, no new rollouts, the old run untouched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.cli import main
from flows.config import Config, to_toml
from flows.curriculum import run_seed
from flows.do import Do, Reached
from flows.progress import Reporter
from flows.run import open_desk, plain
from pipeline.records import canonical
from pipeline.rescoring import REVISIONS, versions
from pipeline.verifiers import verify
from stores import open_store
from stores.trajectories import count
from tests.flows.killed import COMPUTED
from tests.flows.test_run import SHORT, Finished
from tests.flows.tiny import keys_of, quiet

LENIENT = {"id": "python", "function": "tests.flows.rules:same_start"}


@pytest.fixture
def lenient(settle: Callable[..., Config], inputs: Path, finished: Finished) -> Config:
    """The settings of a run on the same prompts, judged leniently, whose evidence is what the finished run stored."""
    pool = ({"path": str(inputs / "pool.jsonl"), "data_source": "tiny", "verifier": LENIENT},)
    return settle(
        **SHORT, prompts={"pool": pool}, evidence={"source": "rescore", "path": str(finished[0])}, name="lenient"
    )


def rescored(config: Config, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run the command and return what it printed."""
    file = folder.with_suffix(".toml")
    file.write_text(to_toml(config))
    assert main(["rescore", str(file), "--dir", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_stored_rollouts_get_other_verdicts_and_counts(
    lenient: Config,
    finished: Finished,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Each shard of the pool comes back with the new verifier's verdicts and counts; nothing is sampled for it."""
    old = open_store(finished[0] / "store")
    before = {key: old.trajectories.read([key]) for key in old.catalog.keys("trajectories")}
    history, files = old.beliefs.history(list(before)), sorted((finished[0] / "store").rglob("*"))
    monkeypatch.setattr("pipeline.generation.transformers.TransformersGenerate.__call__", None)
    printed = rescored(lenient, tmp_path / "new", capsys)
    new = open_store(tmp_path / "new" / "store")
    shards = [key for key in before if old.meta(key)["split"] == "pool"]
    assert printed["rollouts"] == sum(len(before[key]["text"]) for key in shards) > 0
    changed = 0
    for key, shard in zip(printed["keys"], shards, strict=True):
        columns, meta = new.trajectories.read([key]), new.meta(key)
        assert meta["rescored"] == shard and meta["verifiers"] == versions([canonical(LENIENT)])
        for name in columns:
            if name not in ("verdict", "reward"):
                assert list(map(str, columns[name])) == list(map(str, before[shard][name]))
        table = new.tables.read(new.catalog.keys("prompts")[0])
        truth = dict(zip(table["prompt_uid"], table["ground_truth"], strict=True))
        for uid, text, verdict in zip(columns["prompt_uid"], columns["text"], columns["verdict"], strict=True):
            said = verify(LENIENT, truth[uid], text).verdict
            assert verdict in (said, "truncated") and (verdict == said or said == "incorrect")
        expected = {uid: [(s, f)] for uid, s, f in count(columns["prompt_uid"], columns["verdict"])}
        assert new.beliefs.history([key]) == expected
        changed += columns["verdict"] != before[shard]["verdict"]
    assert changed
    assert old.beliefs.history(list(before)) == history
    assert sorted((finished[0] / "store").rglob("*")) == files


def test_the_run_that_uses_them_takes_the_new_counts_only(
    lenient: Config, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first selection of the new run counts each prompt by the new verdicts, and a second run computes nothing."""
    folder = tmp_path / "new"
    quiet(lenient, folder)
    new = open_store(folder / "store")
    shards = [key for key in new.catalog.keys("trajectories") if "rescored" in new.meta(key)]
    history = new.beliefs.history(shards)
    rows = [r for r in pq.read_table(folder / "export" / "selection.parquet").to_pylist() if r["stage"] == 0]
    assert len(rows) == 24
    for row in rows:
        visits = history.get(row["prompt_uid"], [])
        assert row["n_obs"] == sum(s + f for s, f in visits)
        assert row["pass_rate"] == (sum(s for s, _ in visits) / row["n_obs"] if row["n_obs"] else None)
    specs = {
        json.loads(r["reward_spec"])["id"]
        for r in pq.read_table(folder / "export/data/stage_00/train.parquet").to_pylist()
    }
    assert specs == {"python"}
    before = keys_of(folder)
    for module, name in (*COMPUTED.items(), ("pipeline.rescoring", "rescore")):
        monkeypatch.setattr(f"{module}.{name}", None)
    quiet(lenient, folder)
    assert keys_of(folder) == before


def test_what_cannot_be_rescored_is_said(
    lenient: Config,
    finished: Finished,
    settle: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    """A run's own directory, a directory without a store, a source without a path and another source are refused."""
    kept = (finished[0] / "config.toml").read_bytes()
    with pytest.raises(ValueError, match="own directory"):
        quiet(lenient, finished[0])
    assert (finished[0] / "config.toml").read_bytes() == kept
    nowhere = lenient.model_copy(update={"evidence": lenient.evidence.model_copy(update={"path": "nowhere"})})
    with pytest.raises(FileNotFoundError, match=r"'nowhere' holds no store"):
        quiet(nowhere, tmp_path / "a")
    with pytest.raises(ValueError, match=r"evidence\.source = 'rescore' with evidence\.path = ''"):
        settle(evidence={"source": "rescore"})
    (tmp_path / "x.toml").write_text(to_toml(settle()))
    assert main(["rescore", str(tmp_path / "x.toml"), "--dir", str(tmp_path / "b")]) == 1
    assert "set it to 'rescore'" in capsys.readouterr().err


def test_a_shared_catalog_is_refused(lenient: Config, tiny: Config, tmp_path: Path):
    """Two runs on one catalog cannot tell whose rollouts are whose, and the second is refused."""
    shared = f"sqlite:///{tmp_path}/shared.sqlite"
    with open_desk(tiny.model_copy(update={"catalog": shared}), tmp_path / "one", Reporter(quiet=True)):
        pass
    evidence = lenient.evidence.model_copy(update={"path": str(tmp_path / "one")})
    with pytest.raises(ValueError, match=r"catalog = 'sqlite.*give this run a catalog of its own"):
        quiet(lenient.model_copy(update={"catalog": shared, "evidence": evidence}), tmp_path / "two")


def test_other_prompts_have_no_rollouts_to_rescore(lenient: Config, tmp_path: Path):
    """A pool that shares no prompt with the stored rollouts is refused with what its identity is made of."""
    pool = ({**lenient.prompts.pool[0], "data_source": "renamed"},)
    other = lenient.model_copy(update={"prompts": lenient.prompts.model_copy(update={"pool": pool})})
    with pytest.raises(ValueError, match="holds no rollout of this pool's 24 prompts"):
        quiet(other, tmp_path / "c")


def test_another_version_of_a_verifier_is_another_batch(
    settle: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rollouts scored by one version of a verifier are not taken for those of another; the version is in the shard."""
    config, made = settle(**SHORT, evidence={"source": "collect", "rollouts": 2}), []
    for revision in (1, 2):
        monkeypatch.setitem(REVISIONS, "exact", revision)
        with open_desk(config, tmp_path / "run", Reporter(quiet=True)) as desk:
            do = Do(desk, plain, until=("collect", 0))
            with pytest.raises(Reached) as reached:
                run_seed(do)
            made.append(reached.value.keys)
            assert {desk.store.meta(key)["verifiers"]["exact"] for key in made[-1]} == {str(revision)}
    assert not set(made[0]) & set(made[1])
