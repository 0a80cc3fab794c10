"""A step's prompts cut into parts of whole shards, and what a process elsewhere does with one part.

    shards of the step  =  shards of its parts, one after another

A shard has the same key and the same content wherever it is made, so a part may run twice, here or elsewhere: whichever
commits first has made the shard, and counts once. A part is asked for as one JSON text, and works under the lease of
the process that asks: once that is overtaken, its parts commit nothing.
"""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from flows import collecting, evidence, generations, gradients
from flows.desk import Desk
from flows.lent import borrow, lend
from flows.progress import Reporter
from stores.errors import Conflict

STEPS: dict[str, Callable[..., list[str]]] = {"collect": collecting.collect, "featurize": gradients.featurize}
"""Steps whose prompts can be cut."""


def arguments_of(step: str, desk: Desk, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by their names, without the desk."""
    bound = inspect.signature(STEPS[step]).bind(desk, *args, **kwargs)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "desk"}


def plan(desk: Desk, step: str, arguments: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """Return the shards that a step makes with these arguments, by key, and the prompts of each; in their order."""
    policy = arguments["policy"]
    if step == "collect":
        prompts = collecting.asked(desk, arguments["data"], arguments["split"], arguments["uids"])
        made = {name: arguments[name] for name in ("rollouts", "seed")}
        return {key: shard.prompt_uid for key, shard in collecting.shards_of(desk, policy, prompts, **made).items()}
    rollouts = arguments["rollouts"]
    held = evidence.latest_of(desk, rollouts, arguments["uids"]).held
    where = gradients.space(desk, desk.outline(policy), arguments["name"])  # who asks need not hold the policy
    uids = [arguments["uids"][place] for place in held.tolist()]
    return dict(generations.shards_of(desk, policy, uids, rollouts, where))


def cut(keys: Sequence[str], parts: int) -> list[list[str]]:
    """Return keys in at most ``parts`` runs of nearly equal length, none of them empty."""
    parts = min(parts, len(keys))
    return [list(keys[len(keys) * i // parts : len(keys) * (i + 1) // parts]) for i in range(parts)]


def request(
    desk: Desk, step: str, arguments: Mapping[str, Any], shards: Mapping[str, Sequence[str]], *, again: bool = False
) -> str:
    """Return as JSON all that ``work`` needs to make some shards.

    Args:
        desk: of the process that asks, whose lease the work is done under.
        step: a name of ``STEPS``.
        arguments: of the step.
        shards: what is wanted of ``plan``: prompts by key. All but the last that the plan has are of full size.
        again: whether somebody else may still be at work on the same part.
    """
    return json.dumps(
        lend(desk)
        | {
            "step": step,
            "arguments": dict(arguments) | {"uids": [uid for uids in shards.values() for uid in uids]},
            "keys": list(shards),
            "again": again,
        }
    )


def work(text: str) -> dict[str, Any]:
    """Make the shards of a request, those that are in the store excepted.

    The desk is kept for the next request of the same run, and with it the policy, the engine and the projection; after
    an error it is not.

    Returns:
        ``keys`` as asked for, ``prompts`` among them, ``seconds`` that it took, and the ``process`` that did it.

    Raises:
        ValueError: what would be made here is something else: other code, another version of a verifier.
        Fenced: the lease of the process that asked has been taken over.
    """
    began, asked = time.monotonic(), json.loads(text)
    try:
        keys = _make(_desk_for(asked), asked)
    except BaseException:
        _leave()
        raise
    return {
        "keys": keys,
        "prompts": len(asked["arguments"]["uids"]),
        "seconds": time.monotonic() - began,
        "process": os.getpid(),
    }


def _make(desk: Desk, asked: Mapping[str, Any]) -> list[str]:
    from stores.spool import Spool

    step, arguments, wanted = asked["step"], asked["arguments"], asked["keys"]
    found = list(plan(desk, step, arguments))
    if found != wanted:
        raise ValueError(
            f"{step} would make {found[:1]} here, and {wanted[:1]} was asked for: install the same versions of "
            "Influent and of the verifiers' packages on every machine, and give checkpoints by the same path or name"
        )
    # the groups of whoever is still at work on the same shards are not ours to read or to cut
    desk.store.spool = Spool(desk.store.objects.temporary() if asked["again"] else desk.store.root)
    for _ in wanted:
        try:
            return [str(key) for key in STEPS[step](desk, **arguments)]
        except Conflict:  # whoever runs it too was faster, and rounded the last digit in another way: theirs is there
            if all(desk.store.done(key) for key in wanted):
                break
    return [str(key) for key in STEPS[step](desk, **arguments)]


_kept: tuple[tuple[Any, ...], Desk, ExitStack] | None = None


def _desk_for(asked: Mapping[str, Any]) -> Desk:
    """Return a desk under the lease of whoever asks: the one that is kept, if it is of the same run."""
    global _kept
    run = tuple(json.dumps(asked[name]) for name in ("settings", "folder", "lease"))
    if _kept is None or _kept[0] != run:
        _leave()
        stack = ExitStack()
        _kept = run, stack.enter_context(borrow(asked, Reporter(quiet=True))), stack
    return _kept[1]


def _leave() -> None:
    global _kept
    kept, _kept = _kept, None
    if kept is not None:
        kept[2].close()
