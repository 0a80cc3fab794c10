"""Parts of a step: the same shards as the step at once, wherever and however often they are made."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import collecting, gradients, prepare, shards
from flows.config import Config
from flows.desk import Desk
from flows.progress import Reporter
from flows.run import open_desk
from stores import Fenced, open_store
from stores.trajectories import Trajectories

Settle = Callable[..., Config]
EVIDENCE = {"source": "collect", "shard": 5}


@pytest.fixture
def desk(settle: Settle, tmp_path: Path) -> Iterator[Desk]:
    """A desk whose collection makes five shards, the last of four prompts."""
    with open_desk(settle(evidence=EVIDENCE), tmp_path / "run", Reporter(quiet=True)) as desk:
        yield desk
    shards._leave()


def begin(desk: Desk) -> tuple[str, dict[str, Any]]:
    """The key of the start, and the arguments of a collection of the pool."""
    start = prepare.start_policy(desk)
    data = prepare.prompts(desk, start)
    return start, shards.arguments_of("collect", desk, start, data, "pool", rollouts=4, seed=1)


def in_parts(desk: Desk, step: str, arguments: dict[str, Any], parts: int, **options: Any) -> list[str]:
    """Make a step part by part, as workers do; the keys."""
    wanted, made = shards.plan(desk, step, arguments), []
    for keys in shards.cut(list(wanted), parts):
        part = {key: wanted[key] for key in keys}
        made += shards.work(shards.request(desk, step, arguments, part, **options))["keys"]
    return made


@given(st.lists(st.text(), unique=True, max_size=40), st.integers(1, 50))
def test_a_cut_leaves_nothing_out(keys: list[str], parts: int):
    """Parts are in order, at most as many as asked for, none empty, and their lengths differ by one at most."""
    found = shards.cut(keys, parts)
    assert [key for part in found for key in part] == keys
    assert len(found) == min(parts, len(keys))
    assert not found or max(map(len, found)) - min(map(len, found)) <= 1
    assert all(found)


def test_parts_make_the_shards_of_the_step(desk: Desk):
    """Part by part, collecting and featurizing make the keys of the step at once, prompts without rollouts left out."""
    start, arguments = begin(desk)
    made = in_parts(desk, "collect", arguments, 3)
    uids = desk.prompts(arguments["data"], "pool").prompt_uid
    assert made == collecting.collect(desk, **arguments) and len(made) == 5
    some = made[:2] + made[3:]  # ten of the pool have none
    arguments = shards.arguments_of("featurize", desk, start, uids, some, "pool")
    made = in_parts(desk, "featurize", arguments, 2)
    assert made == gradients.featurize(desk, start, uids, some, "pool") and len(made) == 4
    covered = [uid for key in made for uid in desk.store.gradients.read(key)[0]]
    assert set(covered) <= {
        uid for key in some for uid in desk.store.trajectories.read([key], ["prompt_uid"])["prompt_uid"]
    }


def test_a_part_may_be_made_by_ranks(settle: Settle, desk: Desk, tmp_path: Path):
    """Parts whose features two processes make together have the keys of one process, and no process loads the policy."""
    start, arguments = begin(desk)
    made = collecting.collect(desk, **arguments)
    uids = desk.prompts(arguments["data"], "pool").prompt_uid
    arguments = shards.arguments_of("featurize", desk, start, uids, made, "pool")
    expected = list(shards.plan(desk, "featurize", arguments))
    desk.config = settle(evidence=EVIDENCE, features={"ranks": 2})
    desk.let_go()
    assert in_parts(desk, "featurize", arguments, 1) == expected
    assert desk._held is None and shards._kept is not None and shards._kept[1]._held is None


def test_a_part_made_twice_counts_once(desk: Desk):
    """Shards that are made again have the same keys and change no count."""
    _, arguments = begin(desk)
    made = in_parts(desk, "collect", arguments, 2)
    counts = desk.store.beliefs.history(made)
    assert in_parts(desk, "collect", arguments, 5, again=True) == made
    assert desk.store.beliefs.history(made) == counts
    assert sum(s + f for visits in counts.values() for s, f in visits) == 24 * 4


def test_the_faster_of_two_copies_has_made_the_shard(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    """Where a copy elsewhere commits first, with other last digits, its shard stays, and the slower one ends well."""
    _, arguments = begin(desk)
    other, write, raced = open_store(desk.store.root), Trajectories.write, set()

    def late(self: Trajectories, key: str, columns: Any, meta: Any) -> str:
        if self._store is not other and key not in raced:
            raced.add(key)
            logp = [[value - 1e-6 for value in row] for row in columns["logp_old"]]
            write(other.trajectories, key, {**columns, "logp_old": logp}, meta)
        return write(self, key, columns, meta)

    monkeypatch.setattr(Trajectories, "write", late)
    made = in_parts(desk, "collect", arguments, 2)
    monkeypatch.undo()
    assert raced == set(made) and made == collecting.collect(desk, **arguments)
    assert sum(s + f for visits in desk.store.beliefs.history(made).values() for s, f in visits) == 24 * 4


def test_a_lost_lease_refuses_what_a_worker_commits(desk: Desk):
    """Once another process has taken the run over, the parts of the first one commit nothing."""
    _, arguments = begin(desk)
    wanted = shards.plan(desk, "collect", arguments)
    text = shards.request(desk, "collect", arguments, wanted)
    assert desk.store.lease is not None
    desk.store.leases.release(desk.store.lease)
    desk.store.leases.acquire(desk.store.lease.name, 60.0, "another")
    with pytest.raises(Fenced, match="taken over by another"):
        shards.work(text)
    assert not any(desk.store.done(key) for key in wanted)


def test_a_worker_that_would_make_something_else_refuses(desk: Desk):
    """Where other code makes other keys, nothing is computed, and the message says what to do."""
    _, arguments = begin(desk)
    wanted = shards.plan(desk, "collect", arguments)
    asked = json.loads(shards.request(desk, "collect", arguments, wanted))
    asked["keys"][0] = "rollouts-of-another-version"
    with pytest.raises(ValueError, match="install the same versions"):
        shards.work(json.dumps(asked))
    assert not any(desk.store.done(key) for key in wanted)


def test_a_desk_is_kept_for_its_run_alone(desk: Desk):
    """The next part of a run finds policy and engine where they were; another lease, or an error, has its own."""
    _, arguments = begin(desk)
    wanted = shards.plan(desk, "collect", arguments)
    asked = json.loads(shards.request(desk, "collect", arguments, wanted))
    shards.work(json.dumps(asked))
    first = shards._desk_for(asked)
    assert shards._desk_for(asked) is first
    asked["lease"]["fence"] += 1
    second = shards._desk_for(asked)
    assert second is not first
    asked["keys"] = []
    with pytest.raises(ValueError):
        shards.work(json.dumps(asked))
    assert shards._kept is None
