"""Registering the deployments of ``prefect.yaml`` with a Prefect server, serving one of them, and telling it news."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import UUID

from httpx import HTTPError
from prefect import serve
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, StateType
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger, Event, Resource
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.schedules import Cron, Schedule
from prefect.types.entrypoint import EntrypointType

from flows.orchestration import GPU

FILE = Path(__file__).with_name("prefect.yaml")
SILENT = 90.0  # seconds without a heartbeat after which a run is crashed
SILENCE = "influent: a run without a heartbeat is crashed"
HEARTBEAT, PUBLISHED = "prefect.flow-run.heartbeat", "influent.checkpoint.published"


def deploy(config: str, directory: str, *, file: Path = FILE, cron: str = "", gpus: int = 0) -> dict[str, Any]:
    """Register every deployment of a file, its work pool, the limit of accelerators, and the end of silent runs.

    Args:
        config: a TOML file, or the name of a recipe, that all of them get; paths are made absolute.
        directory: the run directory; runs/<name> below the present folder by default.
        file: in the form of ``prefect.yaml``.
        cron: of the deployment ``nightly``, in the place of the file's.
        gpus: steps that may compute on an accelerator at once; 0 for what the server says, 1 at first.

    Returns:
        The deployments by name, with their ids. A second call keeps the ids, and makes the triggers anew.

    Raises:
        ValueError: the file has no deployments, or one that names no flow of ours.
    """
    import yaml

    specs = (yaml.safe_load(file.read_text()) or {}).get("deployments") or []
    if not specs:
        raise ValueError(f"file = {str(file)!r} has no deployments; flows/prefect.yaml is one that has")
    for number, spec in enumerate(specs):
        lacks = [name for name in ("name", "entrypoint", "work_pool") if name not in spec]
        if lacks:
            raise ValueError(
                f"file = {str(file)!r}: deployment {number} lacks {lacks[0]!r}; give it as flows/prefect.yaml does"
            )
    if cron and not any(spec["name"] == "nightly" for spec in specs):
        raise ValueError(
            f"cron = {cron!r}: no deployment of {str(file)!r} is named 'nightly'; give schedules in the file"
        )
    given = parameters_for(config, directory)
    made: dict[str, Any] = {}
    for pool in {spec["work_pool"]["name"] for spec in specs}:
        _ensure_pool(pool)
    for spec in specs:
        made[spec["name"]] = str(_deployment(spec, given, cron).apply())
    _ensure_limit(gpus)
    _ensure_end_of_silence()
    return made


def serve_nightly(config: str, directory: str, cron: str) -> None:
    """Run the nightly curation from this process until it is stopped: the quick start on one machine."""
    import yaml

    spec = next(s for s in yaml.safe_load(FILE.read_text())["deployments"] if s["name"] == "nightly")
    os.environ.update({k: v for k, v in spec["work_pool"]["job_variables"]["env"].items() if k not in os.environ})
    alone = {k: v for k, v in spec.items() if k != "work_pool"} | {"name": "served"}  # not that of ``deploy``
    served = _deployment(alone, parameters_for(config, directory), cron)
    _ensure_limit(0)
    _ensure_end_of_silence()
    serve(served, print_starting_message=False)


def announce(checkpoint: str) -> dict[str, str]:
    """Tell the server that a trainer has written a policy, so that curation for it starts."""
    place = str(Path(checkpoint).absolute()) if Path(checkpoint).exists() else checkpoint
    resource = {"prefect.resource.id": f"influent.checkpoint.{place}"}
    event = Event(event=PUBLISHED, resource=Resource(resource), payload={"checkpoint": place})
    with get_client(sync_client=True) as client:  # at once: what is only queued is lost with the process
        client.request("POST", "/events", json=[event.model_dump(mode="json")]).raise_for_status()
    return {"event": str(event.id), "checkpoint": place}


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Say of a server that does not answer which it is."""
    try:
        yield
    except HTTPError as error:
        raise OSError(f"PREFECT_API_URL = {url!r}: {type(error).__name__}: {error}; is the server running?") from error


def resume(run: str, approved: bool, by: str, note: str) -> dict[str, str]:
    """Let a suspended flow run go on with a decision, which is kept whether it can or not; say what became of it."""
    from prefect.exceptions import FlowPauseTimeout, NotPausedError
    from prefect.flow_runs import resume_flow_run

    try:
        resume_flow_run(UUID(run), run_input={"approve": approved, "by": by, "note": note})
    except (NotPausedError, FlowPauseTimeout, ObjectNotFound, HTTPError, RuntimeError) as error:
        return {"flow_run": f"{run} does not wait any more ({error}); the next run goes on with this decision"}
    return {"flow_run": f"{run} goes on"}


def parameters_for(config: str, directory: str) -> dict[str, str]:
    """Return the parameters of every deployment, with paths that hold wherever the worker starts.

    Raises:
        ConfigError: the configuration cannot be run.
    """
    from flows.config import load_config

    settings = load_config(config)
    file = Path(config)
    place = Path(directory) if directory else Path("runs") / settings.name
    return {"config": str(file.absolute()) if file.is_file() else config, "directory": str(place.absolute())}


def _deployment(spec: dict[str, Any], given: dict[str, str], cron: str) -> RunnerDeployment:
    flow = _flow(spec["entrypoint"])
    names = flow.parameters.properties
    parameters = {**spec.get("parameters", {}), **given}
    pool, limit = spec.get("work_pool", {}), spec.get("concurrency_limit")
    changed = {"cron": cron} if cron and spec["name"] in ("nightly", "served") else {}
    schedules = [_cron(**schedule | changed) for schedule in spec.get("schedules", [])]
    return flow.to_deployment(  # type: ignore[return-value]
        spec["name"],
        schedules=schedules or None,
        parameters={name: value for name, value in parameters.items() if name in names},
        triggers=[DeploymentEventTrigger.model_validate(t) for t in spec.get("triggers", [])],
        description=spec.get("description"),
        tags=sorted({"influent", *spec.get("tags", ())}),
        concurrency_limit=ConcurrencyLimitConfig.model_validate(limit) if limit else None,
        work_pool_name=pool.get("name"),
        job_variables={**pool.get("job_variables", {}), "working_dir": str(Path.cwd())} if pool else None,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def _cron(cron: str, **options: Any) -> Schedule:
    return Cron(cron, **options)


def _flow(entrypoint: str) -> Flow[..., Any]:
    place, _, name = entrypoint.partition(":")
    module = place.removesuffix(".py").replace("/", ".")
    found = getattr(import_module(module), name, None)
    if not isinstance(found, Flow):
        raise ValueError(f"entrypoint = {entrypoint!r} names no flow: write it as path/of/module.py:flow")
    return found


def _ensure_pool(name: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def _ensure_limit(slots: int) -> None:
    """Make the limit of accelerators; ``slots`` = 0 leaves one that is there as it is."""
    with get_client(sync_client=True) as client:
        if slots:
            client.upsert_global_concurrency_limit_by_name(GPU, slots)
        elif GPU not in {limit.name for limit in client.read_global_concurrency_limits()}:
            client.upsert_global_concurrency_limit_by_name(GPU, 1)


def _ensure_end_of_silence() -> None:
    """Have runs crashed whose process died without a word: they would hold their slot, and the schedule, for longer."""
    ends = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended", "Paused")
    silence = EventTrigger(
        match={"prefect.resource.id": ["prefect.flow-run.*"]},  # type: ignore[arg-type]
        match_related={"prefect.resource.id": ["prefect.tag.influent"], "prefect.resource.role": "tag"},  # type: ignore[arg-type]
        after={HEARTBEAT},
        expect={HEARTBEAT, *(f"prefect.flow-run.{end}" for end in ends)},
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=timedelta(seconds=SILENT),
    )
    crash = ChangeFlowRunState(state=StateType.CRASHED, message="its process is gone: no heartbeat for 90 seconds")
    with get_client(sync_client=True) as client:
        if not client.read_automations_by_name(SILENCE):
            client.create_automation(AutomationCore(name=SILENCE, trigger=silence, actions=[crash]))
