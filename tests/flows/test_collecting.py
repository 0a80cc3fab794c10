"""Collection loses no finished group: what a kill leaves behind is kept, and only the rest is asked for again."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import collecting
from flows.config import Config, to_toml
from flows.progress import Reporter
from flows.run import open_desk
from stores import open_store
from stores.spool import Spool
from tests.pipeline.generation.conftest import NO_VLLM

ROOT = Path(__file__).parents[2]
Settle = Callable[..., Config]
ENGINES = {
    "transformers": {"generation": {}, "policy": {"batch_tokens": 60}},
    "vllm": {"generation": {"engine": "vllm", "sequences": 4, "cache": 0.125}, "policy": {}},
}


def run(config: Path, *runs: dict[str, Any]) -> int:
    """Collect in another process; returns how it ended."""
    program = [sys.executable, "-m", "tests.flows.collected", json.dumps({"config": str(config), "runs": runs})]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(program, cwd=ROOT, env=env, check=False).returncode


def entries(log: Path, what: str) -> list[str]:
    """The prompts of a log that were asked for, or finished."""
    return [line.split()[1] for line in log.read_text().splitlines() if line.startswith(what)]


def shards(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Every shard of a run directory, by key."""
    store = open_store(folder / "store")
    return {key: store.trajectories.read([key]) for key in store.catalog.keys("trajectories")}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_killed_collection_asks_only_for_what_is_missing(settle: Settle, tmp_path: Path, engine: str):
    """After SIGKILL at the seventh group, the same command asks for the other 17 alone, and ends as one not killed."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip(NO_VLLM)
    config = tmp_path / "run.toml"
    config.write_text(to_toml(settle(evidence={"shard": 5}, **ENGINES[engine])))
    killed = {"folder": str(tmp_path / "killed"), "log": str(tmp_path / "killed.log")}
    assert run(config, killed | {"after": 7}) == -signal.SIGKILL
    finished = entries(tmp_path / "killed.log", "finished")
    (tmp_path / "killed.log").unlink()
    undisturbed = {"folder": str(tmp_path / "whole"), "log": str(tmp_path / "whole.log")}
    assert run(config, killed, undisturbed) == 0
    again, every = entries(tmp_path / "killed.log", "asked"), entries(tmp_path / "whole.log", "asked")
    assert len(finished) == 7 and len(every) == 24
    assert sorted(again + finished) == sorted(every)
    one, two = shards(tmp_path / "killed"), shards(tmp_path / "whole")
    assert one.keys() == two.keys() and len(one) == 5
    for key, shard in one.items():
        for name in ("prompt_uid", "sample", "verdict", "finish_reason", "text"):
            assert shard[name] == two[key][name]
        for name, close in (("completion_ids", 0.0), ("logp_old", 1e-5)):
            for mine, theirs in zip(shard[name], two[key][name], strict=True):
                assert np.allclose(mine, theirs, rtol=0.0, atol=close)
    assert not list((tmp_path / "killed" / "store" / "spool").iterdir())


def test_shards_are_committed_while_others_are_still_sampled(settle: Settle, tmp_path: Path, monkeypatch):
    """The first shards are in the store before the last group is asked for; their contents do not hang on the order."""
    config = settle(evidence={"source": "collect", "rollouts": 2, "shard": 4}, policy={"batch_tokens": 30})
    seen = []
    add = Spool.add
    with open_desk(config, tmp_path / "run", Reporter(quiet=True)) as desk:

        def watched(spool: Any, key: str, name: str, columns: Any) -> None:
            add(spool, key, name, columns)
            seen.append(len(desk.store.catalog.keys("trajectories")))

        monkeypatch.setattr(Spool, "add", watched)
        from flows import prepare

        start = prepare.start_policy(desk)
        data = prepare.prompts(desk, start)
        keys = collecting.collect(desk, start, data, "pool", rollouts=2, seed=1)
        assert keys == collecting.collect(desk, start, data, "pool", rollouts=2, seed=1)
    assert len(seen) == 24 and len(keys) == 6
    assert seen[-1] > 0


def test_what_a_server_cannot_sample_is_sampled_here(settle: Settle, tmp_path: Path):
    """Behind a server stands the starting checkpoint: the policy under training is sampled by Transformers."""
    config = settle(evidence={"source": "collect"}, generation={"engine": "server", "url": "http://127.0.0.1:9"})
    with open_desk(config, tmp_path / "run", Reporter(quiet=True)) as desk:
        from flows import prepare

        start = prepare.start_policy(desk)
        assert desk.engines.name(start) == "server"
        assert desk.engines.name("policy-of-a-step") == desk.engines.trained == "transformers"
        assert desk.engines.identity("transformers") == {}
