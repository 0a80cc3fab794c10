"""Features by two processes that share the weights: those of one process, also when one of the two is killed."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flows import collecting, evidence, gradients, prepare, ranks
from flows.config import Config
from flows.desk import Desk
from flows.progress import Reporter
from flows.run import open_desk
from pipeline.fsdp import leave_group
from stores import Fenced

SHARD = 2  # prompts: twelve shards


@contextmanager
def collected(config: Config, folder: Path) -> Iterator[tuple[Desk, tuple[str, list[str], list[str]]]]:
    """The desk of a run, and its policy, pool and rollouts."""
    with open_desk(config, folder, Reporter(quiet=True)) as desk:
        start = prepare.start_policy(desk)
        data = prepare.prompts(desk, start)
        uids = list(desk.prompts(data, "pool").prompt_uid)
        yield desk, (start, uids, collecting.collect(desk, start, data, "pool", rollouts=4, seed=1))


def staleness(desk: Desk, keys: list[str]) -> dict[str, dict[str, float]]:
    """How stale the evidence of each prompt is, as it was stored beside its generation."""
    tables = [desk.store.tables.read(evidence.staleness_key(desk, key)) for key in keys]
    return {
        name: {uid: value for table in tables for uid, value in zip(table["prompt_uid"], table[name], strict=True)}
        for name in ("ess", "log_ratio_p99")
    }


def pids(rank: int) -> list[int]:
    """The processes of a rank that this process has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ours = entry.joinpath("stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid())
            if ours and f"\0RANK={rank}\0".encode() in b"\0" + entry.joinpath("environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def kill_after_first_shard(desk: Desk) -> threading.Thread:
    """Kill rank 1 as soon as features are committed."""

    def watch() -> None:
        end = time.monotonic() + 200
        while not desk.store.catalog.keys("gradients") and time.monotonic() < end:
            time.sleep(0.03)
        for pid in pids(1):
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.timeout(400)
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")
def test_a_killed_rank_is_named_and_the_next_run_goes_on(settle: Callable[..., Config], tmp_path: Path, monkeypatch):
    """Two ranks, one of them killed, leave finished shards; the rerun makes the others; all are those of one process."""
    asked: list[list[str]] = []
    inner = ranks._start_and_wait

    def spy(desk: Desk, request: dict[str, Any], *args: Any) -> None:
        asked.append(list(request["shards"]))
        inner(desk, request, *args)

    monkeypatch.setattr(ranks, "_start_and_wait", spy)
    settings = {"evidence": {"source": "collect", "shard": SHARD}}
    with collected(settle(**settings), tmp_path / "one") as (desk, job):
        keys = gradients.featurize(desk, *job, "pool")
        expected = [desk.store.gradients.read(key) for key in keys]
        stale = staleness(desk, keys)
    assert len(keys) >= 8 and not asked
    with collected(settle(**settings, features={"ranks": 2}), tmp_path / "two") as (desk, job):
        killer = kill_after_first_shard(desk)
        with pytest.raises(ChildProcessError, match=r"rank 1 of 2 was killed by SIGKILL"):
            gradients.featurize(desk, *job, "pool")
        killer.join()
        assert not pids(0) and not pids(1)
        finished = [key for key in keys if desk.store.done(key)]
        assert 1 <= len(finished) < len(keys)
        assert gradients.featurize(desk, *job, "pool") == keys
        assert asked == [keys, [key for key in keys if key not in finished]]
        found = [desk.store.gradients.read(key) for key in keys]
        for (uids, rows, norms), (ours, our_rows, our_norms) in zip(expected, found, strict=True):
            assert ours == uids
            assert our_rows == pytest.approx(rows, abs=1e-3)  # half precision
            assert our_norms == pytest.approx(norms, rel=1e-4)
        for name, column in staleness(desk, keys).items():
            assert column == pytest.approx(stale[name], rel=1e-4, abs=1e-5)
        assert gradients.featurize(desk, *job, "pool") == keys
        assert len(asked) == 2  # nothing is started where nothing is missing
    assert sum(len(uids) for uids, _, _ in found) >= 4


def test_ranks_of_a_run_that_was_taken_over_commit_nothing(settle: Callable[..., Config], tmp_path: Path, monkeypatch):
    """The processes commit under the run's lease: with an older fence the first of them is refused."""

    def here(desk: Desk, request: dict[str, Any], *args: Any) -> None:
        file = tmp_path / "request.json"
        file.write_text(json.dumps(request))
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("INFLUENT_MEET", (tmp_path / "meet").as_uri())
        try:
            ranks.main(file)
        finally:
            leave_group()

    monkeypatch.setattr(ranks, "_start_and_wait", here)
    config = settle(evidence={"source": "collect"}, features={"ranks": 2})
    with collected(config, tmp_path / "run") as (desk, job):
        assert desk.store.lease is not None
        desk.store.lease = replace(desk.store.lease, fence=desk.store.lease.fence - 1)
        with pytest.raises(Fenced, match="was taken over"):
            gradients.featurize(desk, *job, "pool")
        assert not desk.store.catalog.keys("gradients") and not desk.store.catalog.keys("staleness")


@pytest.mark.parametrize("features", [{"metric": "adam"}, {"score": "directional"}])
def test_what_ranks_do_not_share_is_refused(settle: Callable[..., Config], features: dict[str, Any]):
    """Adam's metric and scores from forward passes need one process, and the message names both settings."""
    with pytest.raises(ValueError, match=rf"features\.ranks = 2 with .*{next(iter(features.values()))}"):
        settle(features=features | {"ranks": 2})
