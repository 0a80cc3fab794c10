"""The keys of steps: whatever changes a result changes its key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows import prepare, steps
from flows.config import Config
from flows.progress import Reporter
from flows.run import open_desk


def evaluated(config: Config, folder: Path) -> str:
    with open_desk(config, folder, Reporter(quiet=True)) as desk:
        start = prepare.start_policy(desk)
        return steps.evaluate(desk, start, prepare.prompts(desk, start), ["test"])


def test_an_evaluation_is_that_of_its_answers_length_and_stops(settle: Callable[..., Config], begun: Path):
    """In one run directory, longer answers and another stop are other evaluations; a length of its own counts alone."""
    one: dict[str, Any] = {"exact": True, "limit": 2}
    changes: list[dict[str, Any]] = [
        {},
        {"sampling": {"max_new_tokens": 3}},
        {"sampling": {"stop": ("7",)}},
    ]
    keys = [evaluated(settle(evaluate=one, **change), begun) for change in changes]
    assert len(set(keys)) == 3
    assert keys[1] == evaluated(settle(evaluate=one | {"max_new_tokens": 3}), begun)
    assert keys[0] == evaluated(settle(evaluate=one), begun)
