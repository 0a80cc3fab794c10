"""Two processes run the tests: which files go together, and which go first.

A file stays in one process, because its tests share what they set up. All files that start vLLM share one process, which
starts with them: one engine serves them all, and vLLM is imported before anything that it stumbles over. The files that
take longest follow, so that both processes end at about the same time. A plain ``pytest`` keeps its own order.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

ENGINES = (
    "tests/pipeline/generation/test_vllm.py",
    "tests/pipeline/generation/test_conformance.py",
    "tests/pipeline/generation/test_server.py",
    "tests/flows/test_engines.py",
)
LONGEST = ("tests/flows/test_resume.py", "tests/flows/test_collecting.py", "tests/stores/test_faults.py")


def file_of(nodeid: str) -> str:
    """The file of a test."""
    return nodeid.partition("::")[0]


def turn(nodeid: str) -> tuple[bool, bool]:
    """What a test is sorted by."""
    file = file_of(nodeid)
    return file not in ENGINES, file not in LONGEST


class Scheduler(LoadScopeScheduling):
    """Hands out whole files in the order of the tests; those with an engine as if they were one."""

    def _split_scope(self, nodeid: str) -> str:
        file = file_of(nodeid)
        return "engines" if file in ENGINES else file


class ByFile:
    """What pytest calls when it has several processes."""

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: object) -> Scheduler:
        """Hand out by file, in order."""
        config.option.loadscopereorder = False
        return Scheduler(config, log)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Sort, in the processes that run tests for another."""
        if hasattr(config, "workerinput"):
            items.sort(key=lambda item: turn(item.nodeid))
