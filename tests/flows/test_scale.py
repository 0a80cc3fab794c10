"""Pools that are too large for Python objects: what a prompt costs in memory, and what is read at a time."""

import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from flows import evidence, gradients
from flows.progress import Reporter
from flows.run import open_desk
from stores import open_store
from stores.latest import Latest
from tests.flows.test_run import Finished, Settle

ROOT = Path(__file__).parents[2]
BYTES = 700  # of memory a prompt, from gradients to a selection that is stored; as lists and dicts it was 1,800
PEAK = """
import resource, sys
from pathlib import Path
from flows.gradients import score
from flows.steps import select
from tests.benchmarks import pool
desk, count = pool.desk(Path(sys.argv[1])), int(sys.argv[2])
data, rollouts = pool.write_prompts(desk.store, count), pool.write_evidence(desk.store, count, False)
keys = pool.write_gradients(desk.store, count, 8)
scores = score(desk, keys, pool.targets(desk.store))
select(desk, data, rollouts, pool.reasons(count), scores, 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_prompt_takes_some_hundred_bytes(tmp_path: Path):
    """From gradients of 8 numbers to a stored selection, each further prompt adds less than 700 bytes of memory."""
    peaks = []
    for count in (2_000, 100_000):
        command = [sys.executable, "-c", PEAK, str(tmp_path / str(count)), str(count)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout))
    assert peaks[1] - peaks[0] < BYTES * 98_000


def test_featurizing_reads_one_shard_at_a_time(
    finished: Finished, settle: Settle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No reading returns more than a shard's prompts, all together return each rollout once, and a repeat reads none."""
    folder = copytree(finished[0], tmp_path / "copy")
    store = open_store(folder / "store")
    keys = [store.meta(k)["rollouts_key"] for k in store.catalog.keys("policy") if "rollouts_key" in store.meta(k)]
    read, returned = Latest.read, list[list[str]]()

    def counted(self: Latest, places: Any) -> dict[str, list[Any]]:
        found = read(self, places)
        returned.append(found["prompt_uid"])
        return found

    monkeypatch.setattr(Latest, "read", counted)
    with open_desk(settle(evidence={"shard": 5}), folder, Reporter(quiet=True)) as desk:
        (data,) = store.catalog.keys("prompts")
        policy = store.catalog.keys("policy")[0]
        left = evidence.cascade(desk, data, keys).left
        assert returned == []  # what is not worth a gradient is found without reading a whole rollout
        made = gradients.featurize(desk, policy, left, keys, "pool")
        assert [len(set(uids)) for uids in returned] == [5] * (len(left) // 5) + [len(left) % 5] * (len(left) % 5 > 0)
        assert len(made) == len(returned) > 1
        whole = evidence.read_rollouts_of(desk, keys, left)
        assert [uid for uids in returned[: len(made)] for uid in uids] == list(whole.prompt_uid)
        returned.clear()
        assert gradients.featurize(desk, policy, left, keys, "pool") == made
        assert gradients.featurize(desk, policy, left[5:], keys, "pool") == made[1:]
        assert returned == []


def test_an_export_has_every_column_of_every_selection(finished: Finished):
    """Selections of different columns become one, None where a stage did not have a column."""
    from flows import selections
    from flows.desk import Desk

    store = open_store(finished[0] / "store")
    stages = finished[1]["runs"][0]["arms"]["curriculum"]["stages"]
    keys = store.catalog.keys("selection")
    tables = [store.curricula.read(key) for key in keys]
    together = selections.together(Desk(None, finished[0], store, None, None), keys)  # type: ignore[arg-type]
    for name in {name for table in tables for name in table}:
        wanted = [value for t in tables for value in t.get(name, [None] * len(t["stage"]))]
        assert together[name].to_pylist() == wanted
    assert len(stages) > 1 and len({tuple(table) for table in tables}) > 1
