"""The command line: data on standard output, progress on standard error.

Exit codes: 0 ok, 1 failed, 2 usage, 3 verification failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SINGLE = {
    "collect": ("collect", "sample and score the rollouts that the first selection needs"),
    "featurize": ("featurize", "compute and store the projected gradients of a stage"),
    "score": ("score", "score a stage's influence"),
    "select": ("select", "select a stage"),
    "train": ("train", "train a stage"),
    "evaluate": ("evaluate", "train a stage, and evaluate its checkpoints"),
}
"""Commands that run the loop up to one step of one stage, plainly; what is done already is not done again."""
SCHEDULED = {
    "serve": "run the nightly curation from here until stopped, with a Prefect server on loopback",
    "deploy": "register nightly, triggered and weekly flows with the Prefect server of PREFECT_API_URL",
    "announce": "tell the Prefect server that a trainer has written a policy, so that curation for it starts",
    "approve": "release the stage that waits for a person, or reject it",
}
"""Commands that talk to a Prefect server."""
STORED = {
    "status": "say what a run directory holds",
    "verify": "read every stored file and compare it with its checksum",
    "gc": "delete files that nothing refers to and that are older than the grace period",
    "retire": "hide a stored thing; gc deletes it, and the files that nothing else names, after its grace period",
    "merge": "copy what another run directory's store has and this one lacks",
    "lineage": "say what a stored thing was made from, with which settings and code",
}
"""Commands on the store of a run directory."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    main = argparse.ArgumentParser(
        prog="influent", description="Which prompts to train on next, in what order, and how much each counts."
    )
    main.add_argument("--version", action="store_true", help="print the version")
    commands = main.add_subparsers(dest="command", metavar="command")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--json", action="store_true", help="print the result as JSON, and no progress")
        return command

    def with_places(command: argparse.ArgumentParser) -> None:
        command.add_argument("config", help="a TOML file, or the name of a recipe")
        command.add_argument("--dir", type=Path, help="run directory; runs/<name> by default")

    def with_run(command: argparse.ArgumentParser) -> None:
        with_places(command)
        command.add_argument("--seed", type=int, help="seed, instead of the file's")

    run = add("run", "run the whole loop as a Prefect flow: select, train, evaluate, export, report")
    with_run(run)
    run.add_argument("--seeds", type=int, default=1, metavar="N", help="run N seeds, counted up from the file's")
    run.add_argument("--no-prefect", action="store_true", help="call the steps plainly, without Prefect")
    run.add_argument("--dry-run", action="store_true", help="say what each step will take, and start nothing")
    run.add_argument("--completion-tokens", type=float, default=0.0, metavar="N", help="expected, for --dry-run")
    run.add_argument("--tflops", type=float, default=0.0, metavar="X", help="of the device, for --dry-run")
    for name, (_, text) in SINGLE.items():
        command = add(name, text)
        with_run(command)
        command.add_argument("--stage", type=int, help="stage, counted from 0; the first that has this step by default")
        if name == "evaluate":
            command.add_argument(
                "--validity",
                action="store_true",
                help="instead, hold the scores of some prompts against what those prompts do to the newest checkpoint",
            )
            command.add_argument(
                "--prompts", type=int, metavar="N", help="prompts that --validity draws; 128 by default"
            )
    for name, text in (
        ("export", "run the loop if need be, and write the stages as a dataset"),
        ("report", "run the loop if need be, and write the report"),
        ("import", "check rollouts made elsewhere against the pool, and store those that match"),
        ("rescore", "score another run's stored rollouts with this run's verifiers; no new rollouts"),
    ):
        with_run(add(name, text))
    curate = add("curate", "select one subset for the policy as it is, and export it; nothing is trained")
    with_run(curate)
    curate.add_argument("--checkpoint", default="", help="folder or name of the policy, instead of the file's")
    scheduled = {name: add(name, text) for name, text in SCHEDULED.items()}
    for name in ("serve", "deploy"):
        with_places(scheduled[name])
        scheduled[name].add_argument("--cron", default="", metavar="WHEN", help="of the nightly curation; '0 2 * * *'")
    scheduled["serve"].add_argument("--port", type=int, default=4200, help="of 127.0.0.1, for the server; 4200")
    scheduled["deploy"].add_argument("--file", type=Path, help="in the form of prefect.yaml; the package's by default")
    scheduled["deploy"].add_argument("--gpus", type=int, default=0, metavar="N", help="steps on an accelerator at once")
    scheduled["announce"].add_argument("checkpoint", help="its folder, or its name")
    scheduled["approve"].add_argument("dir", type=Path, help="run directory")
    scheduled["approve"].add_argument("--by", required=True, metavar="NAME", help="who decides")
    scheduled["approve"].add_argument("--note", default="", help="why")
    scheduled["approve"].add_argument("--selection", default="", metavar="KEY", help="where several wait")
    scheduled["approve"].add_argument("--reject", action="store_true", help="do not train on it")
    stored = {}
    for name, text in STORED.items():
        stored[name] = add(name, text)
        stored[name].add_argument("dir", type=Path, help="run directory")
    stored["gc"].add_argument(
        "--grace", type=float, default=24.0, metavar="HOURS", help="keep what is younger; longer than a step; 24"
    )
    stored["merge"].add_argument("other", type=Path, help="the run directory that is read")
    for name in ("lineage", "retire"):
        stored[name].add_argument("key", help="a key, such as manifest.json and summary.json name them")
    add("recipes", "list the recipes that come with the package")
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = parser().parse_args(argv)
    if arguments.version:
        from importlib.metadata import version

        print(version("influent"))
        return 0
    if not arguments.command:
        parser().print_help()
        return 2
    from flows import commands
    from flows.config import ConfigError

    try:
        result, code = commands.dispatch(arguments)
    except ConfigError as error:
        print(f"influent: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError, commands.StoreError) as error:
        print(f"influent: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("influent: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    _print(result, as_json=arguments.json)
    return code


def _print(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=1, default=str))
        return
    for name, value in result.items():
        print(f"{name}: {', '.join(map(str, value)) if isinstance(value, list | tuple) else value}")


if __name__ == "__main__":
    sys.exit(main())
