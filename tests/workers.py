"""Several processes run the tests: which files go together, and which go first.

A file stays in one process, because its tests share what they set up. All files that start vLLM share one process, which
begins with them: one engine serves them all, and vLLM is imported before what it may stumble over. The files that take
longest follow, so that all processes end at about the same time. A plain ``pytest`` keeps its own order.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = {
    "engines": (
        "tests/flows/test_engines.py",
        "tests/pipeline/generation/test_conformance.py",
        "tests/pipeline/generation/test_server.py",
        "tests/pipeline/generation/test_vllm.py",
    ),
}
LONGEST = (
    "tests/flows/test_survival.py",
    "tests/flows/test_deployments.py",
    "tests/flows/test_cluster.py",
    "tests/flows/test_resume.py",
    "tests/flows/test_collecting.py",
    "tests/stores/test_faults.py",
)
GROUPS = {file: group for group, files in TOGETHER.items() for file in files}


class Scheduler(LoadScopeScheduling):
    """Hands out whole files in the order of the tests; those that go together as if they were one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return GROUPS.get(file, file)


class ByFile:
    """A plugin of pytest: sorts the tests where several processes run them, and hands them out."""

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: object) -> Scheduler:
        """Hand out in the order of the tests, and not the files with most tests first."""
        config.option.loadscopereorder = False
        return Scheduler(config, log)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Sort: groups first, then the longest files, then the rest as they come."""
        if not hasattr(config, "workerinput"):
            return
        turns = {file: turn for turn, file in enumerate((*GROUPS, *LONGEST))}
        items.sort(key=lambda item: turns.get(item.nodeid.partition("::")[0], len(turns)))
