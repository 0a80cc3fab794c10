"""A whole run: the run directory, its store, the seeds one after another, and what is left at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from flows.config import Config, to_toml
from flows.curriculum import run_seed
from flows.desk import Desk
from flows.do import Wrap, doing
from flows.progress import Reporter
from flows.provenance import code_version
from flows.windows import Windows


def plain(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap nothing: the step as it is."""
    return step


@contextmanager
def open_desk(
    config: Config, folder: Path, reporter: Reporter, windows: Windows | None = None, *, patience: float = 0.0
) -> Iterator[Desk]:
    """Open the run directory and everything that the steps need.

    Args:
        config: the settings.
        folder: the run directory.
        reporter: shows progress.
        windows: what others see of the run.
        patience: seconds to wait for another process that is at work in the directory.

    Raises:
        Fenced: one is, and goes on.
    """
    import torch

    from pipeline.rewards import VerifierPool
    from stores import open_store

    if config.evidence.source == "rescore" and Path(config.evidence.path).resolve() == folder.resolve():
        raise ValueError(
            f"evidence.path = {config.evidence.path!r} is this run's own directory: rollouts under other verdicts are "
            "another run; give it another name, or another --dir"
        )
    from flows.dryrun import fitted
    from flows.summary import write_text

    budgeted = fitted(config)
    folder.mkdir(parents=True, exist_ok=True)
    if config.policy.threads:
        torch.set_num_threads(config.policy.threads)
    settings = to_toml(config.model_copy(update={"report_to": ()}))  # who watches changes no result
    store = open_store(folder / "store", config.catalog or None, config.objects or None)
    with (
        store.hold(f"run {config.name}" if config.catalog else "run", patience=patience),
        VerifierPool(config.verifiers.processes, config.verifiers.timeout) as verifiers,
    ):
        write_text(folder / "config.toml", to_toml(config))
        key = store.key("settings", toml=settings)
        store.origin = {"code": code_version(), "settings": key}
        if not store.done(key):
            store.record(key, "settings", {}, {"config.toml": settings.encode()})
        desk = Desk(budgeted, folder, store, verifiers, reporter, windows)
        try:
            yield desk
        finally:
            desk.engines.close()


def run(
    config: Config,
    folder: Path,
    reporter: Reporter,
    *,
    seeds: Sequence[int] = (),
    wrap: Wrap = plain,
    windows: Windows | None = None,
    patience: float = 0.0,
) -> dict[str, Any]:
    """Run the loop for each seed, then summarize, export and report; returns the summary.

    Args:
        config: the settings.
        folder: the run directory.
        reporter: shows progress.
        seeds: one run each; that of the settings by default.
        wrap: turns a step's name and callable into the callable to use.
        windows: as for ``open_desk``, like ``patience``.
        patience: the same.
    """
    from flows import facts, summary
    from flows.export import export
    from pipeline.report import render

    if config.report_to:
        from flows.tracking import require

        require(config.report_to)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    done, shown = [], None
    for number, seed in enumerate(seeds or [config.seed]):
        seeded = config.model_copy(update={"seed": seed})
        with (
            open_desk(seeded, folder, reporter, windows, patience=patience) as desk,
            _reporting(desk),
            doing(desk, wrap) as do,
        ):
            data, arms = run_seed(do)
            done.append(summary.summarize(desk, data, arms, do.seconds))
            summary.write_metrics(folder, desk, arms, append=number > 0)
            if number == 0:
                export(desk, data, arms[0])
                shown = facts.gather(desk, data, arms[0])
    whole = summary.combine(config, done)
    summary.write_json(folder / "summary.json", whole)
    assert shown is not None
    summary.write_text(folder / "report.html", render(shown | {"summary": whole}))
    if windows is not None:
        windows.ended(config, whole)
    return whole


def _reporting(desk: Desk) -> AbstractContextManager[None]:
    if not desk.config.report_to:
        return nullcontext()
    from flows.tracking import reporting

    return reporting(desk)
