"""The commands that talk to a Prefect server: which server, and with which home."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from flows.server import quieten, server

HOME = Path("runs") / "prefect"
"""Where Prefect's files lie, unless PREFECT_HOME says otherwise."""


def scheduled(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command and return what to print."""
    if arguments.command == "serve":
        quieten(HOME)
        return _serve(arguments)
    if arguments.command == "approve":
        return _approve(arguments.dir, arguments.selection, not arguments.reject, arguments.by, arguments.note)
    if not os.environ.get("PREFECT_API_URL"):
        raise OSError(
            f"PREFECT_API_URL is not set, and {arguments.command!r} needs a server that stays: start one and name it "
            "(OPERATIONS.md says how), or use 'influent serve'"
        )
    quieten(HOME)
    from flows import deploy

    with deploy.reaching(os.environ["PREFECT_API_URL"]):
        if arguments.command == "announce":
            return deploy.announce(arguments.checkpoint)
        file, directory = arguments.file or deploy.FILE, str(arguments.dir or "")
        return deploy.deploy(arguments.config, directory, file=file, cron=arguments.cron, gpus=arguments.gpus)
    raise AssertionError("not reached")


def _serve(arguments: argparse.Namespace) -> dict[str, Any]:
    cron, place = arguments.cron or "0 2 * * *", (arguments.config, str(arguments.dir or ""))
    if os.environ.get("PREFECT_API_URL"):
        return _serve_at(os.environ["PREFECT_API_URL"], cron, *place)
    with server(Path(os.environ["PREFECT_HOME"]), arguments.port) as url:
        os.environ["PREFECT_API_URL"] = url
        return _serve_at(url, cron, *place)


def _serve_at(url: str, cron: str, config: str, directory: str) -> dict[str, Any]:
    from flows.deploy import serve_nightly

    print(f"{config} is curated at {cron!r} (UTC); see {url.removesuffix('/api')}; stop with Ctrl-C", file=sys.stderr)
    serve_nightly(config, directory, cron)
    return {"served": config}


def _approve(folder: Path, selection: str, approved: bool, by: str, note: str) -> dict[str, Any]:
    from flows.commands import store_of
    from flows.release import decide, waiting

    found = waiting(folder, selection)
    decision = decide(store_of(folder), found["selection"], approved=approved, by=by, note=note)
    if "flow_run" in found:
        quieten(HOME)
        os.environ.setdefault("PREFECT_API_URL", found["api"])
        from flows.deploy import resume

        return decision | resume(found["flow_run"], approved, by, note)
    return decision
