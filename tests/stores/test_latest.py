"""The latest rollouts of some prompts: those that a slow reader of everything finds, and nothing besides."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stores import open_store
from stores.latest import latest
from stores.store import Store

SHARDS = st.lists(st.lists(st.sampled_from("abcde"), max_size=12), max_size=5)
COLUMNS = ["prompt_uid", "seed", "completion_ids"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(tmp_path_factory.mktemp("latest"))


def columns(uids: list[str], seed: int) -> dict[str, list[Any]]:
    n = len(uids)
    ids = [np.arange(1 + i % 3, dtype=np.int32) for i in range(n)]
    return {
        "prompt_uid": uids,
        "sample": list(range(n)),
        "policy": ["p"] * n,
        "step": [0] * n,
        "prompt_ids": ids,
        "completion_ids": ids,
        "logp_old": [row.astype(np.float32) for row in ids],
        "temperature": [1.0] * n,
        "finish_reason": ["stop"] * n,
        "seed": [seed + i for i in range(n)],
        "text": [""] * n,
        "reward": [float(i % 2) for i in range(n)],
        "verdict": ["correct"] * n,
    }


def write(store: Store, shards: list[list[str]]) -> list[str]:
    keys = []
    for number, uids in enumerate(shards):
        key = store.key("rollouts", n=number, uids=uids)
        keys.append(store.trajectories.write(key, columns(uids, 100 * number), {}))
    return keys


def slowly(store: Store, keys: list[str], uids: list[str], recent: int) -> dict[str, list[int]]:
    """The seeds of each prompt's latest rollouts, from all that is stored."""
    whole, groups = store.trajectories.read(keys), defaultdict[str, list[int]](list)
    for uid, seed in zip(whole["prompt_uid"], whole["seed"], strict=True):
        groups[uid].append(seed)
    return {uid: groups[uid][-recent:] for uid in uids if groups[uid]}


@given(shards=SHARDS, uids=st.lists(st.sampled_from("abcdef"), unique=True), recent=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_the_latest_are_those_of_a_slow_reader(shared: Store, shards: list[list[str]], uids: list[str], recent: int):
    """Read prompt by prompt or scanned shard by shard, they are the last of all that is stored, oldest first."""
    keys = write(shared, shards)
    keys = list(dict.fromkeys(keys))
    expected = slowly(shared, keys, uids, recent)
    found = latest(shared.trajectories, keys, uids, recent)
    assert [uids[place] for place in found.held] == list(expected)
    read = found.read(range(len(uids)))
    assert read["prompt_uid"] == [uid for uid, seeds in expected.items() for _ in seeds]
    assert read["seed"] == [seed for seeds in expected.values() for seed in seeds]
    scanned = defaultdict[str, list[int]](list)
    for places, table in found.scan(["seed"]):
        for place, seed in zip(places, table["seed"].to_pylist(), strict=True):
            scanned[uids[place]].append(seed)
    assert scanned == expected
    backwards = found.read(found.held[::-1])
    assert backwards["prompt_uid"] == [uid for uid, seeds in reversed(expected.items()) for _ in seeds]


def test_shards_without_the_prompt_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Reading a prompt opens the shards that hold its latest rollouts, and of older ones nothing."""
    store = open_store(tmp_path)
    keys = write(store, [["a", "b"], ["b"], ["a", "a"], ["c"]])
    found, opened = latest(store.trajectories, keys, ["a", "b", "c"], 2), list[str]()
    tables = store.trajectories.tables
    monkeypatch.setattr(store.trajectories, "tables", lambda k, names: opened.extend(k) or tables(k, names))
    assert found.read([0])["prompt_uid"] == ["a", "a"]
    assert opened == [keys[2]]
    opened.clear()
    assert found.read([1, 2])["seed"] == [1, 100, 300]
    assert opened == [keys[0], keys[1], keys[3]]


def test_who_is_where_costs_one_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Finding the latest reads the column of prompts and no other."""
    store, asked = open_store(tmp_path), set[str]()
    keys, tables = write(store, [["a"], ["b"]]), store.trajectories.tables
    monkeypatch.setattr(store.trajectories, "tables", lambda k, names: asked.update(names) or tables(k, names))
    latest(store.trajectories, keys, ["a"], 2)
    assert asked == {"prompt_uid"}
