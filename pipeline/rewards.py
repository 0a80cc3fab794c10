"""Rewards: many completions scored by their prompts' verifiers, each within a hard time limit.

``exact`` and ``numeric`` are total functions of strings and run here. All others may hang or crash, so they run in a
few processes (spawned: forking a process that has threads or a GPU is not safe). A worker that is late is killed and
replaced, and one that dies costs only the item it held.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import math
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

from pipeline.records import Prompts
from pipeline.verifiers import (
    ERROR,
    EXTRACTS,
    SPEC_KEYS,
    TIMEOUT,
    Verdict,
    gold_completion,
    known_id,
    resolve,
    task_of,
    verify,
)

__all__ = ["IN_FLIGHT", "Verdict", "VerifierPool", "check_gold", "check_specs", "verify"]

IN_FLIGHT = 256
"""Items handed to the workers at once: bounds memory, and keeps two dozen workers busy."""

IN_PROCESS = ("exact", "numeric")
WARM = {"math-verify": "math_verify", "reasoning-gym": "reasoning_gym"}
RESTARTS = 3

Item = tuple[str, str, str]
"""(verifier spec as JSON, ground truth, completion)."""


class VerifierPool:
    """Scores completions; a context manager, to be used from one thread.

    Workers start with the first item that needs one. Importing ``math_verify`` and ``reasoning_gym`` is not counted in
    the time limit; importing the module of a ``python`` verifier is. Workers' own output is discarded.

    Args:
        processes: worker processes, at least 1.
        timeout: hard limit per item [s].
    """

    def __init__(self, processes: int = 2, timeout: float = 10.0) -> None:
        if processes < 1:
            raise ValueError(f"processes = {processes} must be at least 1")
        if not timeout > 0:
            raise ValueError(f"timeout = {timeout} must be a positive number of seconds")
        self.processes = processes
        self.timeout = timeout
        self._pool: Any = None
        self._warm: frozenset[str] = frozenset()

    def __enter__(self) -> Self:
        """Return this pool; no worker is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the workers."""
        self._stop()

    def score(self, items: Sequence[Item]) -> list[Verdict]:
        """Return one verdict per item, in order.

        Args:
            items: (verifier spec as JSON, ground truth, completion).

        Raises:
            ValueError: a verifier id is unknown.
            RuntimeError: no worker can be started.
        """
        ids = [_id_of(spec) for spec, _, _ in items]
        self._prepare(frozenset(ids) & frozenset(WARM))
        verdicts: list[Verdict | None] = [None] * len(items)
        flying: deque[tuple[int, Any, Any]] = deque()
        for i, (name, item) in enumerate(zip(ids, items, strict=True)):
            if name in IN_PROCESS:
                verdicts[i] = _score(*item)
                continue
            flying.append((i, *self._submit(item)))
            if len(flying) >= IN_FLIGHT:
                self._land(flying, verdicts, items)
        while flying:
            self._land(flying, verdicts, items)
        return [verdict for verdict in verdicts if verdict is not None]

    def _land(self, flying: deque[tuple[int, Any, Any]], verdicts: list[Verdict | None], items: Sequence[Item]) -> None:
        """Wait for the oldest item in flight and note its verdict."""
        i, pool, future = flying.popleft()
        for _ in range(RESTARTS):
            error = _outcome(pool, future)
            if error is None or not isinstance(error, BrokenProcessPool):
                verdicts[i] = _verdict(error, future)
                return
            if pool is self._pool:  # else it was replaced already, on behalf of an earlier item
                self._stop()
            pool, future = self._submit(items[i])
        raise RuntimeError(
            f"verifier workers died {RESTARTS} times before they took an item; a script that scores must keep its work "
            "under `if __name__ == '__main__':`, and the machine must have memory for them"
        )

    def _prepare(self, wanted: frozenset[str]) -> None:
        """Have the workers import what the coming items need: an import must not count as a slow verifier."""
        if not wanted <= self._warm:
            self._stop()
            self._warm |= wanted

    def _submit(self, item: Item) -> tuple[Any, Any]:
        """Hand one item to the workers, which are started if there are none."""
        if self._pool is not None and not self._pool.active:
            self._stop()
        if self._pool is None:
            from pebble import ProcessPool

            self._pool = ProcessPool(
                max_workers=self.processes,
                initializer=_start_worker,
                initargs=([WARM[name] for name in sorted(self._warm)],),
                context=multiprocessing.get_context("spawn"),
            )
        return self._pool, self._pool.schedule(_score, args=item, timeout=self.timeout)

    def _stop(self) -> None:
        """Stop and forget the workers."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None


def check_specs(prompts: Prompts) -> None:
    """Refuse a pool with a verifier that cannot run, before any rollout is paid for.

    Raises:
        ValueError: a spec is no JSON object, has an unknown id, key or value, or names a function that is not there.
    """
    for text in dict.fromkeys(prompts.verifier):
        try:
            spec = json.loads(text)
        except json.JSONDecodeError as err:
            raise ValueError(f"verifier {text[:200]!r} is not JSON ({err}); write it with canonical()") from err
        check_spec(spec)


def check_spec(spec: Mapping[str, Any]) -> None:
    """Refuse one spec that cannot run; see ``check_specs``."""
    name = known_id(spec)
    for key in spec:
        if key != "id" and key not in SPEC_KEYS[name] and name != "python":
            near = difflib.get_close_matches(key, SPEC_KEYS[name], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {list(SPEC_KEYS[name])}"
            raise ValueError(f"verifier {name!r} has no key {key!r}; {hint}")
    _one_of(spec, "take", ("first", "last"))
    _one_of(spec, "extract", EXTRACTS)
    for key in ("threshold", "tolerance"):
        value = spec.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"{key} = {value!r} of verifier {name!r} must be a finite number >= 0")
    if name == "python":
        resolve(spec.get("function"))
    if name == "reasoning-gym" and not task_of(spec):
        raise ValueError("verifier 'reasoning-gym' needs the whole entry, with metadata.source_dataset, under 'entry'")


def check_gold(prompts: Prompts, pool: VerifierPool) -> dict[str, str]:
    """Return the prompts whose own gold answer is not scored correct by their own verifier, with its verdict.

    Such a prompt teaches nothing: no completion, or only a wrong one, is ever rewarded.

    Args:
        prompts: the pool of prompts.
        pool: what scores them.

    Returns:
        prompt_uid -> verdict, for the prompts that fail.
    """
    check_specs(prompts)
    golds = [
        gold_completion(json.loads(spec), truth)
        for spec, truth in zip(prompts.verifier, prompts.ground_truth, strict=True)
    ]
    verdicts = pool.score(list(zip(prompts.verifier, prompts.ground_truth, golds, strict=True)))
    pairs = zip(prompts.prompt_uid, verdicts, strict=True)
    return {uid: verdict.verdict for uid, verdict in pairs if verdict.verdict != "correct"}


def _score(spec: str, ground_truth: str, completion: str) -> Verdict:
    return verify(json.loads(spec), ground_truth, completion)


@lru_cache(maxsize=1024)  # the completions of one prompt share its spec
def _id_of(spec: str) -> str:
    return known_id(json.loads(spec))


def _outcome(pool: Any, future: Any) -> BaseException | None:
    """Wait for ``future`` and return its exception; a pool that broke may never resolve it."""
    while not wait([future], timeout=1.0).done:
        if not pool.active and not future.done():
            return BrokenProcessPool("the pool broke before it took this item")
    error: BaseException | None = future.exception()
    return error


def _verdict(error: BaseException | None, future: Any) -> Verdict:
    """Return what ``future`` found; a worker that was killed for being late, or died, is a verdict too."""
    failed = TIMEOUT if isinstance(error, TimeoutError) else ERROR
    return failed if error is not None else Verdict(**vars(future.result()))


def _start_worker(modules: list[str]) -> None:
    """Silence this worker (results go to our stdout, and nothing else may) and import what its verifiers need."""
    sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.close(null)
    for module in modules:
        with contextlib.suppress(ImportError):  # the item that needs it becomes an "error"
            importlib.import_module(module)


def _one_of(spec: Mapping[str, Any], key: str, values: tuple[str, ...]) -> None:
    if key in spec and spec[key] not in values:
        raise ValueError(f"{key} = {spec[key]!r} of verifier {spec['id']!r} must be one of {list(values)}")
