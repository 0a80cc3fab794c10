"""The benchmark of growth runs, and its page is what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import scale, scale_page

ROOT = Path(__file__).parents[2]


def test_the_benchmark_runs_and_makes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Small pools go through every step, leave nothing behind, and fill the page's three tables and its picture."""
    out, place = tmp_path / "scale.json", tmp_path / "pools"
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--small", "--folder", str(place), "--out", str(out)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert list(place.iterdir()) == []
    result = json.loads(out.read_text())
    assert [(row["prompts"], row["step"]) for row in result["rows"]] == [
        (n, s) for n in scale.SMALL for s in scale.ORDER
    ]
    assert all(row["memory"] > 0 and row["seconds"] > 0 for row in result["rows"])
    page = tmp_path / "SCALE.md"
    page.write_text((ROOT / "SCALE.md").read_text())
    monkeypatch.setattr(scale_page, "PAGE", page)
    monkeypatch.setattr(scale_page, "PICTURE", tmp_path / "docs" / "scale.svg")
    scale_page.write(result)
    first = scale_page.PICTURE.read_bytes()
    scale_page.write(result)
    assert scale_page.PICTURE.read_bytes() == first
    assert "| select | " in page.read_text() and "500 prompts" in page.read_text()
