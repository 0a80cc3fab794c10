"""Prefect's pages on a run: its result in ten lines, the best prompts by id, progress, one asset a selection, a form.

What is shown lies in the server's database: short, numbers and ids alone, never the text of a model or a data set.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.assets import add_asset_metadata, materialize
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from prefect.settings import PREFECT_API_URL
from pydantic import Field

from flows import release, selections
from flows.arms import Arm, Stage
from flows.progress import Advance, Reporter
from flows.windows import Windows

if TYPE_CHECKING:
    from flows.config import Config
    from flows.desk import Desk

ROWS = 100  # of the table of prompts
LONG = 10.0  # seconds after which a step is shown as it goes on
EVERY = 5.0  # seconds between two looks of the server at it
PATIENCE = 30 * 24 * 3600  # seconds that a stage waits for a person
RELEASED, FINISHED = "influent.selection.released", "influent.stage.finished"


class Approval(RunInput):
    """The form in which a person decides on a stage."""

    approve: bool = Field(description="train on this stage")
    by: str = Field(description="who decides")
    note: str = Field("", description="why")


class Waits(Exception):
    """A stage is waiting for a person already, in another flow run."""


class Pages(Windows):
    """What a Prefect server shows of a run.

    Args:
        folder: the run directory.
        seed: the one whose stages are exported, where the run has several.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder.absolute(), seed

    def wait(self, desk: Desk, selection: str) -> None:
        """Suspend the flow run until somebody fills in the form; a run that is no deployment's waits where it is.

        Raises:
            Waits: another flow run is suspended on this selection.
        """
        if not deployment.id:
            super().wait(desk, selection)
            return
        self._refuse_a_second(selection)
        release.announce(desk, selection, flow_run=str(flow_run.id), api=PREFECT_API_URL.value() or "")
        facts = desk.store.meta(selection)
        text = f"**{desk.config.name}**, stage {facts['stage']}: {facts['size']} prompts are selected, `{selection}`."
        form = Approval.with_initial_data(description=text)
        said = suspend_flow_run(wait_for_input=form, timeout=PATIENCE, key=selection)
        release.decide(desk.store, selection, approved=said.approve, by=said.by, note=said.note)

    def released(self, desk: Desk, stage: Stage) -> None:
        """Show a selection as an asset, and its best prompts by id."""
        name = f"{slug(desk.config.name)}/seed_{desk.config.seed}/stage_{stage.number:02d}"
        facts = {"selection": stage.selection, "control": stage.control, "scores": stage.scores}
        facts |= {"policy": stage.policy, "size": desk.store.meta(stage.selection)["size"], "folder": str(self.folder)}
        asset = f"influent://{name}"

        @materialize(asset, name="release", persist_result=False)
        def show() -> None:
            add_asset_metadata(asset, facts)
            rows = _best(desk, stage.selection)
            create_table_artifact(rows, key=slug(f"{name}-prompts"), description=f"best prompts of {stage.selection}")

        with _at_best():
            show()
        self._emit(RELEASED, stage.selection, facts | {"stage": stage.number, "seed": desk.config.seed})

    def finished(self, desk: Desk, arm: Arm) -> None:
        """Say that a stage is trained, with what its export needs."""
        if desk.config.seed == self.seed:
            stage, facts = arm.stages[-1], {"folder": str(self.folder), "seed": self.seed}
            self._emit(FINISHED, stage.selection, facts | {"stage": stage.number})

    def ended(self, config: Config, result: dict[str, Any]) -> None:
        """Show what came out, in a few lines, with the way to the report and the export."""
        lines = [f"# {config.name}", "", *(f"- {name}: `{value}`" for name, value in _facts(result).items())]
        for name in ("report.html", "summary.json", "export"):
            if (self.folder / name).exists():
                lines.append(f"- [{name}]({(self.folder / name).as_uri()})")
        with _at_best():
            create_markdown_artifact("\n".join(lines), key=slug(f"{config.name}-result"))

    def _refuse_a_second(self, selection: str) -> None:
        try:
            other = release.waiting(self.folder, selection).get("flow_run", "")
        except FileNotFoundError:
            return
        if not other or other == str(flow_run.id):
            return
        with get_client(sync_client=True) as client:
            try:
                state = client.read_flow_run(UUID(other)).state
            except ObjectNotFound:  # a new server knows nothing of it
                return
        if state is not None and not state.is_final():  # it waits, or has its answer and is about to go on
            raise Waits(f"selection {selection} waits for approval in flow run {other}: decide there")

    def _emit(self, event: str, selection: str, facts: dict[str, Any]) -> None:
        with _at_best():
            emit_event(event, resource={"prefect.resource.id": f"influent.selection.{selection}"}, payload=facts)


class Shown(Reporter):
    """Writes to the log of the flow run; ``with_progress`` lets it show what takes long as it goes on."""

    def heading(self, text: str) -> None:
        """Begin a part of the run."""
        get_run_logger().info("%s", text)

    def line(self, text: str) -> None:
        """State a fact."""
        get_run_logger().info("%s", text)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Say nothing: a table may hold a prompt's text."""


def with_progress(reporter: Reporter) -> Reporter:
    """Let a reporter's bars show in Prefect as well."""
    inner = reporter.bar

    @contextmanager
    def bar(label: str, total: int) -> Iterator[Advance]:
        with _progress(label, total) as show, inner(label, total) as advance:

            def both(n: int, note: str = "") -> None:
                advance(n, note)
                show(n)

            yield both

    reporter.bar = bar  # type: ignore[method-assign]
    return reporter


def slug(text: str) -> str:
    """Return a text as the key of an artifact: small letters, digits and dashes."""
    clean = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return clean if text.isascii() else f"{clean}-{sha256(text.encode()).hexdigest()[:8]}".strip("-")


@contextmanager
def _progress(label: str, total: int) -> Iterator[Any]:
    began = shown = time.monotonic()
    done = 0
    artifact: Any = None

    def show(n: int) -> None:
        nonlocal done, shown, artifact
        done += n
        now = time.monotonic()
        if total and now - began > LONG and now - shown > EVERY:
            shown, share = now, 100.0 * done / total
            with _at_best():
                if artifact is None:
                    artifact = create_progress_artifact(share, key=slug(label), description=label)
                else:
                    update_progress_artifact(artifact, progress=share)

    yield show
    if artifact is not None:
        with _at_best():
            update_progress_artifact(artifact, progress=100.0)


@contextmanager
def _at_best() -> Iterator[None]:
    """Let nothing that only shows end what computes."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("a page of this run is not up to date: %s: %s", type(error).__name__, error)


def _best(desk: Desk, selection: str) -> list[dict[str, Any]]:
    table = selections.stage(desk, selection)
    names = ("rank", "prompt_uid", "score_influence", "score_wmi", "pass_rate", "n_obs", "drawn")
    columns = [*names, *selections.targets_of(table)]
    return [{name: table[name][row] for name in columns} for row in range(min(ROWS, len(table["rank"])))]


def _facts(result: dict[str, Any]) -> dict[str, Any]:
    """Return the few numbers of a result that fit on a page."""
    if "final" not in result:
        return result
    facts: dict[str, Any] = {"version": result["version"], "seeds": result["seeds"]}
    for arm, sets in result["final"].items():
        for name, value in sets["test"].items():
            half = "" if value["half_width"] is None else f" ± {value['half_width']:.3f}"
            facts[f"{arm}, test, {name.replace('_', ' ')}"] = f"{value['mean']:.3f}{half}"
    return facts
