"""The table of files that go together is of files that are there, and misses none with an engine."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_files_that_go_together_are_there():
    """Every file that is grouped, or goes early, exists; every file that uses a fixture with an engine is in that group."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed: tests run in one process")
    from tests.workers import GROUPS, LONGEST, TOGETHER

    assert [file for file in (*GROUPS, *LONGEST) if not (ROOT / file).is_file()] == []
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    texts.pop(str(Path(__file__).relative_to(ROOT)))
    with_engine = {file for file, text in texts.items() if re.search(r"\b(vllm_engine|server_url)\b", text)}
    assert with_engine and with_engine <= set(TOGETHER["engines"])
