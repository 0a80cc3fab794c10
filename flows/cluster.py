"""Steps on a Ray cluster, through Prefect's Ray task runner. The door to ``ray`` and ``prefect_ray``.

A step's shards are cut into parts, each a Prefect task on a worker; what is in the store is not asked for. A worker
that dies is replaced by Ray, an outage is tried again by Prefect, and a part that is late is started once more
elsewhere: whichever ends first counts, since both make the same shards (``flows.shards``).
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from flows import shards
from flows.config import Config
from flows.desk import Desk
from flows.server import QUIET

OBJECT_STORE = 100_000_000  # bytes of shared memory that a Ray of this machine takes: parts are asked for by key
LATE = 4.0  # times the median of the parts that have ended: nothing ends for so long, and what is left starts again
LATE_LEAST = 60.0  # seconds; a worker takes some to start
LOOK = 2.0  # seconds that nothing can interrupt, Ctrl-C included

Submit = Callable[[str], Any]


def spread(config: Config, name: str, step: Callable[..., Any], trying: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a step that has its shards made on the cluster of the settings; the step itself where that cannot be.

    Args:
        config: the settings.
        name: of the step.
        step: with its desk bound as the first argument.
        trying: options of a Prefect task, for each part: how often it is tried again, and after what.
    """
    if not config.cluster.runner or name not in shards.STEPS or not isinstance(step, partial):
        return step
    desk: Desk = step.args[0]

    def call(*args: Any, **kwargs: Any) -> list[str]:
        arguments = shards.arguments_of(name, desk, *args, **kwargs)
        wanted = shards.plan(desk, name, arguments)
        missing = [key for key in wanted if not desk.store.done(key)]
        parts = [{key: wanted[key] for key in keys} for keys in shards.cut(missing, config.cluster.parts)]
        if parts:
            connect(config)
            total = sum(map(len, wanted.values()))
            label = f"{name} on {config.cluster.runner}, {len(parts)} part{'s' * (len(parts) > 1)}"
            with desk.reporter.bar(label, total) as advance, _submitting(config, name, trying) as submit:
                advance(total - sum(len(uids) for part in parts for uids in part.values()))
                _make(parts, partial(shards.request, desk, name, arguments), submit, advance)
        return list(wanted)

    return call


def connect(config: Config, **options: Any) -> None:
    """Connect this process to the Ray of the settings until it ends; one of this machine alone is started for it.

    Args:
        config: the settings.
        options: for ``ray.init``, beside those of the settings.

    Raises:
        ValueError: the extra is not installed, or workers could not reach the Prefect server.
        OSError: no cluster answers at the address.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import prefect_ray  # noqa: F401
        import ray
    except ImportError as error:
        raise ValueError("cluster.runner = 'ray' needs what this lacks: pip install 'influent[ray]'") from error
    if not ray.is_initialized():
        address = config.cluster.address
        place = {"address": address} if address else _here()
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": {"env_vars": QUIET}}
        try:
            ray.init(**place, **quiet, **options)
        except (ConnectionError, ray.exceptions.RaySystemError) as error:
            raise OSError(f"cluster.address = {address!r}: {error}; start the cluster, or mend the address") from error
    _check_that_prefect_is_reachable(ray)


def _here() -> dict[str, Any]:
    """Return the options of a Ray of this machine alone, for this process and its children."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # some of its ports are open to the network
    return {
        "address": "local",
        "_node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE,
    }


def _check_that_prefect_is_reachable(ray: Any) -> None:
    url = os.environ.get("PREFECT_API_URL", "")
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(machines) > 1 and urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(
            f"PREFECT_API_URL = {url!r} is not seen from the {len(machines)} machines of the cluster: start a server "
            "that they reach, and give its address"
        )


@contextmanager
def _submitting(config: Config, name: str, trying: Mapping[str, Any]) -> Iterator[Submit]:
    """Give what hands a request to a worker, as a task of the flow, and returns its future."""
    from prefect import flow, task
    from prefect.context import FlowRunContext, TaskRunContext
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    part = task(name=f"{name}, a part", **trying)(shards.work)
    around = FlowRunContext.get()
    if around is not None:  # what surrounds a task goes with it to the worker, and the run's own flow holds a desk
        around = around.model_copy(update={"flow": flow(_elsewhere), "parameters": {}})

    def bare(request: str) -> Any:
        TaskRunContext.__var__.set(None)  # type: ignore[arg-type]
        with remote_options(num_cpus=config.policy.threads or 1, num_gpus=config.cluster.gpus):
            if around is None:
                return runner.submit(part, {"text": request})
            with around:
                return runner.submit(part, {"text": request})

    with RayTaskRunner() as runner:
        yield lambda request: copy_context().run(bare, request)


def _elsewhere() -> None:
    """Stand in for the flow that a part belongs to."""


def _make(
    parts: Sequence[Mapping[str, Sequence[str]]],
    ask: Callable[..., str],
    submit: Submit,
    advance: Callable[[int], None],
) -> None:
    """Have every part made; one that is late is started once more, and what is then left over is stopped."""
    import ray

    flying: dict[Any, tuple[int, Any]] = {}
    left, twice, took, last = set(range(len(parts))), set[int](), list[float](), time.monotonic()

    def start(number: int, *, again: bool = False) -> None:
        future = submit(ask(parts[number], again=again))
        flying[future.wrapped_future] = (number, future)

    try:
        for number in sorted(left):
            start(number)
        while left:
            due = last + max(LATE * median(took), LATE_LEAST) if took and left - twice else None
            ended, _ = ray.wait(list(flying), num_returns=1, timeout=LOOK)
            if not ended and (due is None or time.monotonic() < due):
                continue
            if not ended:
                for number in sorted(left - twice):
                    start(number, again=True)
                twice |= left
                continue
            number, future = flying.pop(ended[0])
            made = _outcome(future, last_hope=number in left and all(other != number for other, _ in flying.values()))
            if made and number in left:
                left.remove(number)
                took.append(made["seconds"])
                last = time.monotonic()
                advance(made["prompts"])
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)


def _outcome(future: Any, *, last_hope: bool) -> dict[str, Any] | None:
    """Return what a part came to; None where it failed and somebody else is at work on it, or has done it."""
    from ray.exceptions import RayError

    try:
        return dict(future.result())
    except RayError as error:
        if last_hope:
            told = str(error).strip().splitlines()[-1:]
            raise OSError(
                f"a part was given up: {type(error).__name__}{': ' * len(told)}{''.join(told)}. Workers need the same "
                "version of Influent as this process, and memory; finished shards are kept: run the same command again"
            ) from error
    except Exception:
        if last_hope:
            raise
    return None
