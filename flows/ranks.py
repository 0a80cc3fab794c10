"""Features by several processes that share the policy's weights: started here, and what each of them runs.

The run starts ``features.ranks`` processes on this machine, which meet over a file and talk over the loopback
interface. They make one shard of prompts after another; the first commits each as soon as it is done, under the run's
own lease: once somebody has taken the run over, it is refused. A process that dies ends the others, and the next run
goes on from the last shard. They end, too, when the run does.

Across machines: ``torchrun ... -m flows.ranks REQUEST`` runs the same program, where all of them see the run directory
and the file of the request, and the store is one that several machines may use. That has not been tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flows import evidence, generations, gradients
from flows.desk import Desk
from flows.lent import borrow, end_with_parent, how_it_ended, lend
from flows.progress import Advance, Reporter

POLL = 0.1  # seconds between looks at the processes
GRACE = 1.0  # seconds in which others may say what they died of, once one has died
LAST = 12  # lines of a dead process's log that an error shows


def featurize(
    desk: Desk, policy: str, uids: Sequence[str], rollouts: Sequence[str], label: str, *, name: str
) -> list[str]:
    """Have processes make the features of the shards that the store lacks, and return the keys of all shards.

    Raises:
        ChildProcessError: a process died; the message says which, and shows the last lines of its log.
    """
    where = gradients.space(desk, desk.outline(policy), name)
    keys = generations.shards_of(desk, policy, uids, rollouts, where)
    missing = {key: shard for key, shard in keys.items() if not desk.store.done(key)}
    with desk.reporter.bar(f"gradients, {label}", len(uids)) as advance:
        advance(sum(len(shard) for key, shard in keys.items() if key not in missing))
        if missing:
            desk.let_go()
            job = {"policy": policy, "name": name, "rollouts": list(rollouts), "shards": missing}
            request = lend(desk) | {"device": desk.config.policy.device} | job
            _start_and_wait(desk, request, desk.config.features.ranks, missing, advance)
    return list(keys)


def _start_and_wait(
    desk: Desk, request: dict[str, Any], ranks: int, missing: Mapping[str, list[str]], advance: Advance
) -> None:
    with TemporaryDirectory(prefix="influent-ranks-") as place:
        file, logs = Path(place) / "request.json", [Path(place) / f"rank-{rank}.log" for rank in range(ranks)]
        file.write_text(json.dumps(request), encoding="utf-8")
        processes = [_start(file, rank, ranks, log) for rank, log in enumerate(logs)]
        try:
            waiting = list(missing)
            while any(process.poll() is None for process in processes):
                if any(process.poll() for process in processes):
                    break
                while waiting and desk.store.done(waiting[0]):
                    advance(len(missing[waiting.pop(0)]))
                time.sleep(POLL)
            if any(process.poll() for process in processes):
                time.sleep(GRACE)
                raise ChildProcessError(_obituary([process.poll() for process in processes], logs))
            advance(sum(len(missing[key]) for key in waiting))
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _start(request: Path, rank: int, ranks: int, log: Path) -> subprocess.Popen[bytes]:
    here = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    here["INFLUENT_MEET"] = request.with_name("meet").as_uri()
    here["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    if sys.platform == "linux":  # one machine: nothing has to be reachable from outside
        here = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} | here
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.ranks", str(request)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=here,
        )


def _obituary(codes: Sequence[int | None], logs: Sequence[Path]) -> str:
    """Say what each dead process died of: first those that were killed, since the others may have died of that."""
    dead = sorted((code > 0, rank, code) for rank, code in enumerate(codes) if code)
    parts = []
    for _, rank, code in dead:
        lines = logs[rank].read_text(errors="replace").splitlines()[-LAST:]
        parts.append("\n".join([f"rank {rank} of {len(codes)} {how_it_ended(code)}", *(f"  {line}" for line in lines)]))
    return (
        "features.ranks: " + "\n".join(parts) + "\nfinished shards are kept; the same command goes on from there. If "
        "memory ran out, lower policy.micro_tokens or raise features.ranks"
    )


def main(file: Path) -> None:
    """Be one of the processes: make the shards of a request together with the others."""
    from pipeline.fsdp import join_group, leave_group

    end_with_parent(lambda: os._exit(1))
    request = json.loads(file.read_text(encoding="utf-8"))
    rank, ranks, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = join_group(request["device"], rank, ranks, local=local, meet=os.environ.get("INFLUENT_MEET", "env://"))
    with borrow(request, Reporter(quiet=True)) as desk:
        _make(desk, request, device, commits=rank == 0)
    leave_group()


def _make(desk: Desk, request: dict[str, Any], device: str, *, commits: bool) -> None:
    from pipeline.fsdp import load_sharded
    from pipeline.records import Rollouts
    from pipeline.sharded import sketch_gradients

    policy, name, rollouts = request["policy"], request["name"], request["rollouts"]
    checkpoint, adapter = desk.source(policy)
    loaded = load_sharded(checkpoint, device=device, **desk.loading(adapter))
    where = gradients.space(desk, loaded, name)
    uids = [uid for shard in request["shards"].values() for uid in shard]
    latest, place = evidence.latest_of(desk, rollouts, uids), {uid: i for i, uid in enumerate(uids)}
    for expected, shard in request["shards"].items():
        key = generations.generation_key(desk, policy, where, shard, rollouts)
        if key != expected:
            raise RuntimeError(f"the shard of {shard[0]} is {expected} to the run, and {key} here; report this")
        watched = generations.Watched()
        found, rows = sketch_gradients(
            loaded,
            Rollouts.of(latest.read([place[uid] for uid in shard])),
            desk.config.features.objective,
            where.projection,
            micro_tokens=desk.config.policy.micro_tokens,
            scope=where.scope,
            watch=watched,
        )
        if commits:
            seen = watched if name == "features" else None
            generations.write_generation(desk, key, policy, where, found, rows, seen)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
