"""The one test that starts Prefect: a temporary server takes half a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flows.config import Config, to_toml
from tests.flows.tiny import timeless

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from flows.config import load_config
from flows.orchestration import run_as_flow
from flows.progress import Reporter

run_as_flow(load_config(sys.argv[1]), Path(sys.argv[2]), Reporter(quiet=True), seeds=[0])
"""


def test_a_flow_is_the_plain_run(finished: tuple[Path, dict[str, Any]], tiny: Config, tmp_path: Path):
    """The run as a Prefect flow comes to what the plain run comes to, without a warning on either output."""
    (tmp_path / "tiny.toml").write_text(to_toml(tiny))
    known = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "tiny.toml", tmp_path / "run"],
        cwd=ROOT,
        env=known | {"PREFECT_HOME": str(tmp_path / "prefect")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "warn" not in (ended.stdout + ended.stderr).lower()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert timeless(summary) == timeless(finished[1])
