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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from flows import shards
from flows.config import Config
from flows.desk import Desk
from stores.errors import Conflict, Damaged, Fenced, Missing, StoreError

QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
OBJECT_STORE = 100_000_000  # bytes of shared memory that a Ray of this machine takes: parts are asked for by key
RETRIES = 2  # of a part, after an outage of the catalog or the bucket
PAUSE = 10.0  # seconds before each
LATE = 4.0  # times the median of the parts that have ended: nothing ends for so long, and what is left starts again
LATE_LEAST = 60.0  # seconds; a worker takes some to start


def runner(config: Config) -> Any:
    """Return the task runner of the settings for Prefect's ``flow``; None where the steps run in this process.

    Raises:
        ValueError: the extra is not installed.
    """
    settings = config.cluster
    if not settings.runner:
        return None
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    options = {"address": settings.address} if settings.address else _here()
    try:
        from prefect_ray import RayTaskRunner
    except ImportError as error:
        raise ValueError("cluster.runner = 'ray' needs what this lacks: pip install 'influent[ray]'") from error
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "runtime_env": {"env_vars": QUIET}}
    return RayTaskRunner(init_kwargs=options | quiet)


def _here() -> dict[str, Any]:
    """Return the options of a Ray of this machine alone, for this process and its children."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # some of its ports are open to the network
    return {
        "address": "local",
        "_node_ip_address": "127.0.0.1",
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE,
    }


def spread(config: Config, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a step that has its shards made on the cluster of the settings; the step itself where that cannot be.

    Args:
        config: the settings.
        name: of the step.
        step: with its desk bound as the first argument, to be called inside a flow that has ``runner``.
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
            _check_that_prefect_is_reachable()
            total = sum(map(len, wanted.values()))
            with desk.reporter.bar(f"{name} on {config.cluster.runner}, {len(parts)} parts", total) as advance:
                advance(total - sum(len(uids) for part in parts for uids in part.values()))
                ask = partial(shards.request, desk, name, arguments)
                _make(parts, ask, _submit(config, name), advance)
        return list(wanted)

    return call


def _submit(config: Config, name: str) -> Callable[[str], Any]:
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect_ray.context import remote_options

    part = task(
        name=f"{name}, a part",
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=RETRIES,
        retry_delay_seconds=PAUSE,
        retry_condition_fn=_is_an_outage,
    )(shards.work)

    def submit(request: str) -> Any:
        with remote_options(num_cpus=config.policy.threads or 1, num_gpus=config.cluster.gpus):
            return part.submit(request)

    return submit


def _is_an_outage(task: Any, run: Any, state: Any) -> bool:
    """Whether another attempt may go better: the disk, the network or a server failed, not the work."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, OSError | StoreError) and not isinstance(error, Conflict | Damaged | Fenced | Missing)


def _make(
    parts: Sequence[Mapping[str, Sequence[str]]],
    ask: Callable[..., str],
    submit: Callable[[str], Any],
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
            patience = None
            if took and left - twice:
                patience = max(0.0, last + max(LATE * median(took), LATE_LEAST) - time.monotonic())
            ended, _ = ray.wait(list(flying), num_returns=1, timeout=patience)
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
            raise OSError(
                f"a part was given up after its workers died again and again ({type(error).__name__}): look for what "
                "ends them, memory most often, and run the same command again; finished shards are kept"
            ) from error
    except Exception:
        if last_hope:
            raise
    return None


def _check_that_prefect_is_reachable() -> None:
    import ray

    url = os.environ.get("PREFECT_API_URL", "")
    elsewhere = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(elsewhere) > 1 and urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(
            f"PREFECT_API_URL = {url!r} is not seen from the {len(elsewhere)} machines of the cluster: start a server "
            "that they reach, and give its address"
        )
