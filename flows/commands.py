"""What each command does, once its arguments are read."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from flows.cli import SCHEDULED, SINGLE, STORED
from flows.config import Config, load_config, recipes
from flows.progress import Reporter
from stores.errors import Damaged, StoreError

__all__ = ["StoreError", "dispatch"]

Result = tuple[dict[str, Any], int]

BRINGING = {"import": ("import_rollouts", "the file"), "rescore": ("rescore", "the directory of the other run")}
"""Commands that bring rollouts in and do no more: their step, and what ``evidence.path`` is for them."""


def dispatch(arguments: argparse.Namespace) -> Result:
    """Run the command and return (result to print, exit code)."""
    if arguments.command == "recipes":
        return {"recipes": recipes()}, 0
    if arguments.command in STORED:
        return _stored(arguments)
    if arguments.command in SCHEDULED:
        from flows.scheduling import scheduled

        return scheduled(arguments), 0
    reporter = Reporter(quiet=arguments.json)
    config = load_config(arguments.config)
    if arguments.seed is not None:
        config = config.model_copy(update={"seed": arguments.seed})
    if arguments.command == "run" and (arguments.dry_run or arguments.completion_tokens or arguments.tflops):
        return _dry_run(arguments, config, reporter)
    folder = arguments.dir or Path("runs") / config.name
    if arguments.command == "evaluate" and (arguments.validity or arguments.prompts is not None):
        return _validity(arguments, config, folder, reporter)
    if arguments.command in SINGLE:
        return _single(config, folder, reporter, SINGLE[arguments.command][0], arguments.stage)
    if arguments.command == "curate":
        from flows.curate import curate

        return curate(config, folder, reporter, checkpoint=arguments.checkpoint), 0
    if arguments.command in BRINGING:
        return _bring(config, folder, reporter, arguments.command)
    return _run(arguments, config, folder, reporter)


def _run(arguments: argparse.Namespace, config: Config, folder: Path, reporter: Reporter) -> Result:
    seeds = list(range(config.seed, config.seed + getattr(arguments, "seeds", 1)))
    if config.cluster.runner and getattr(arguments, "no_prefect", False):
        raise ValueError(
            f"--no-prefect with cluster.runner = {config.cluster.runner!r}: Prefect is what hands the parts to the "
            "cluster; leave out the one or the other"
        )
    if arguments.command == "run" and not arguments.no_prefect:
        from flows.orchestration import run_as_flow

        summary = run_as_flow(config, folder, reporter, seeds=seeds)
    else:
        from flows.run import run

        summary = run(config, folder, reporter, seeds=seeds)
    _tell(reporter, summary)
    places = {"summary": folder / "summary.json", "export": folder / "export", "report": folder / "report.html"}
    return {name: str(path.absolute()) for name, path in places.items()}, 0


def _dry_run(arguments: argparse.Namespace, config: Config, reporter: Reporter) -> Result:
    from flows.dryrun import estimate, tell

    if not arguments.dry_run:
        raise ValueError("--completion-tokens and --tflops are expectations of --dry-run; add it, or leave them out")
    found = estimate(config, completion_tokens=arguments.completion_tokens, tflops=arguments.tflops)
    tell(reporter, found, arguments.seeds)
    names = ("rollouts", "sampled", "computed", "disk", "memory", "seconds")
    return found if arguments.json else {name: f"{found['total'][name]:.4g}" for name in names}, 0


def _tell(reporter: Reporter, summary: dict[str, Any]) -> None:
    reporter.heading("result")
    rows = []
    for arm, sets in summary["final"].items():
        one = summary["runs"][0]["arms"][arm]
        rows.append([arm, str(one["steps"]), f"{one['rollouts']:,}", *(_value(v) for v in sets["test"].values())])
    names = [name.replace("_", " ") for name in summary["final"]["curriculum"]["test"]]
    reporter.table("on the test set, at the end", ["run", "steps", "rollouts", *names], rows)
    for pair, kinds in summary["paired_differences"].items():
        for kind, when in (("final", "at the end"), ("mean", "over the run")):
            facts = [f"{name.replace('_', ' ')} {_value(v, sign='+')}" for name, v in kinds[kind]["test"].items()]
            reporter.line(f"{pair}, test, {when}: " + ", ".join(facts))
    if len(summary["seeds"]) == 1:
        reporter.line("one seed: these differences carry no interval; --seeds 5 gives them one")


def _value(v: dict[str, Any], sign: str = "") -> str:
    half = "" if v["half_width"] is None else f" ± {v['half_width']:.3f}"
    return f"{v['mean']:{sign}.3f}{half}"


def _single(config: Config, folder: Path, reporter: Reporter, step: str, stage: int | None) -> Result:
    from flows.curriculum import run_seed
    from flows.do import Reached, doing
    from flows.run import open_desk, plain

    collects = config.evidence.source != "first_stage"
    first = 0 if step in ("train", "evaluate") or collects else 1
    number = first if stage is None else stage
    if not 0 <= number < len(config.train.stages):
        raise ValueError(f"--stage {number}: this run has stages 0 to {len(config.train.stages) - 1}")
    if number < first:
        raise ValueError(
            f"--stage {number}: with evidence.source = 'first_stage', stage 0 is a shuffle and has no {step}"
        )
    with open_desk(config, folder, reporter) as desk, doing(desk, plain, (step, number)) as do:
        try:
            run_seed(do)
        except Reached as reached:
            return {"step": step, "stage": number, "keys": reached.keys}, 0
    if do.found:
        return {"step": step, "stage": number, "keys": do.found}, 0
    raise ValueError(f"step {step!r} does not occur in stage {number}")


def _validity(arguments: argparse.Namespace, config: Config, folder: Path, reporter: Reporter) -> Result:
    from flows import validity
    from flows.run import open_desk

    if not arguments.validity or arguments.stage is not None:
        raise ValueError(
            "--prompts goes with --validity, and --stage without it: the newest checkpoint is what it measures"
        )
    prompts = validity.PROMPTS if arguments.prompts is None else arguments.prompts
    with open_desk(config, folder, reporter) as desk:
        result = validity.measure(desk, prompts)
    return result if arguments.json else validity.tell(result), 0


def _bring(config: Config, folder: Path, reporter: Reporter, command: str) -> Result:
    from flows.do import doing
    from flows.run import open_desk, plain
    from flows.story import count_rollouts

    step, place = BRINGING[command]
    if config.evidence.source != command:
        raise ValueError(
            f"evidence.source = {config.evidence.source!r}: set it to {command!r}, and evidence.path to {place}"
        )
    with open_desk(config, folder, reporter) as desk, doing(desk, plain) as do:
        keys = do(step, do("prompts", do("start_policy")))
        return {"keys": keys, "rollouts": count_rollouts(desk, keys)}, 0


def _stored(arguments: argparse.Namespace) -> Result:
    try:
        store = store_of(arguments.dir)
    except Damaged as error:
        if arguments.command == "verify":
            return {"files": 0, "damaged": [str(error)]}, 3
        raise
    if arguments.command == "retire":
        store.catalog.retire(arguments.key)
        return {"retired": arguments.key}, 0
    if arguments.command == "gc":
        return swept(store, arguments.grace)
    if arguments.command == "merge":
        return _merge(store, arguments.other)
    if arguments.command == "lineage":
        return _lineage(store, arguments.key)
    return {"status": _status, "verify": verified}[arguments.command](store)


def store_of(folder: Path) -> Any:
    """Open the store of a run directory."""
    from flows.collecting import open_other

    return open_other(folder)


def _status(store: Any) -> Result:
    kinds: dict[str, int] = {}
    for key in store.catalog.keys():  # noqa: SIM118  a method of the catalog, not of a dict
        kinds[key.rsplit("-", 1)[0]] = kinds.get(key.rsplit("-", 1)[0], 0) + 1
    return {"store": str(store.root), "catalog": store.catalog.name, "objects": store.objects.name, **kinds}, 0


def verified(store: Any) -> Result:
    """Read every stored file; return what is damaged, and the exit code."""
    from stores.verification import verify

    began = time.monotonic()
    verdicts = list(verify(store))
    bad = [f"{v.key}/{v.name}: {v.wrong}" if v.file else v.wrong for v in verdicts if v.wrong]
    seconds, read = time.monotonic() - began, sum(v.read for v in verdicts) / 2**20
    facts = {"files": len(verdicts), "MiB": round(read, 1), "seconds": round(seconds, 2)}
    return facts | {"MiB_per_second": round(read / seconds, 1), "damaged": bad}, 3 if bad else 0


def swept(store: Any, hours: float) -> Result:
    """Delete what nothing refers to; return how much."""
    from stores.collector import collect

    found = collect(store, hours * 3600)
    return {"objects": found.objects, "temporaries": found.temporaries}, 0


def _merge(store: Any, other: Path) -> Result:
    from stores.merge import merge

    found = merge(store, store_of(other))
    return {"copied": found.copied, "present": found.present}, 0


def _lineage(store: Any, key: str) -> Result:
    from stores.lineage import lineage

    return lineage(store, key), 0
