"""The flows that a Prefect server schedules; ``prefect.yaml`` and ``flows.deploy`` say when, and how many at once.

Parameters are a configuration (a file, or a recipe's name) and a directory: paths, as the worker sees them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.states import Completed

from flows.config import Config, load_config
from flows.orchestration import tasks
from flows.pages import Pages, Shown, Waits, slug, with_progress

PATIENCE = 24 * 3600.0  # seconds that a run waits for another one in the same directory


@flow(persist_result=False, flow_run_name="curriculum {config}")
def curriculum(config: str = "embedded", directory: str = "", seed: int | None = None, seeds: int = 1) -> Any:
    """Run the loop: select, train, evaluate, export and report; what is done already is not done again.

    Args:
        config: a TOML file, or the name of a recipe.
        directory: the run directory; runs/<name> by default.
        seed: instead of the file's.
        seeds: how many to run, counted up.
    """
    from flows.run import run

    settings, folder = _settings(config, directory, seed)
    numbers = range(settings.seed, settings.seed + seeds)
    try:
        run(
            settings,
            folder,
            with_progress(Shown(quiet=True)),
            seeds=numbers,
            wrap=tasks(settings),
            **_around(settings, folder),
        )
    except Waits as waits:
        return Completed(name="Waits", message=str(waits))
    return {name: str(folder.absolute() / name) for name in ("summary.json", "report.html", "export")}


@flow(persist_result=False, flow_run_name="curate {config}")
def curate(config: str = "embedded", directory: str = "", seed: int | None = None, checkpoint: str = "") -> Any:
    """Select one subset for the policy as it is, and export it.

    Args:
        config: a TOML file, or the name of a recipe.
        directory: the run directory; runs/<name> by default.
        seed: instead of the file's.
        checkpoint: folder or name of the policy, instead of the file's.
    """
    from flows.curate import curate as once

    settings, folder = _settings(config, directory, seed)
    try:
        return once(
            settings,
            folder,
            with_progress(Shown(quiet=True)),
            checkpoint=checkpoint,
            wrap=tasks(settings),
            **_around(settings, folder),
        )
    except Waits as waits:
        return Completed(name="Waits", message=str(waits))


@flow(persist_result=False, flow_run_name="export {directory}")
def export(directory: str, seed: int | None = None) -> dict[str, str]:
    """Export the stages that are finished, while their run goes on.

    Args:
        directory: the run directory.
        seed: of the run; that of the newest stage by default.
    """
    from flows.export import export_kept

    return {"export": str(export_kept(Path(directory), with_progress(Shown(quiet=True)), seed).absolute())}


@flow(persist_result=False, flow_run_name="maintain {directory}")
def maintain(directory: str, grace: float = 24.0) -> dict[str, Any]:
    """Read every stored file and compare it with its checksum, then delete what nothing refers to.

    Args:
        directory: the run directory.
        grace: hours; younger files are kept.

    Raises:
        Damaged: a file is not what was stored; nothing is deleted.
    """
    from flows.commands import store_of, swept, verified
    from stores.errors import Damaged

    store = store_of(Path(directory))
    found, code = verified(store)
    if code:
        raise Damaged(f"{directory}: {len(found['damaged'])} damaged: " + "; ".join(found["damaged"][:10]))
    facts = found | swept(store, grace)[0]
    lines = [f"- {name}: {value}" for name, value in facts.items() if name != "damaged"]
    create_markdown_artifact("\n".join(lines), key=slug(f"{Path(directory).name}-maintenance"))
    return facts


def _settings(config: str, directory: str, seed: int | None) -> tuple[Config, Path]:
    settings = load_config(config)
    if seed is not None:
        settings = settings.model_copy(update={"seed": seed})
    return settings, Path(directory or f"runs/{settings.name}")


def _around(settings: Config, folder: Path) -> dict[str, Any]:
    return {"windows": Pages(folder, settings.seed), "patience": PATIENCE}
