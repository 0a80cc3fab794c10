"""Making and scoring entries of reasoning-gym ends in time; all else of it is tested with ``load_prompts``."""

import time
from pathlib import Path

import pytest

from pipeline import gym
from pipeline.prompts import load_prompts

FOREVER = """
import time
from reasoning_gym.arithmetic.{module} import {name}

def forever(self, *args, **kwargs):
    while True:
        time.sleep(1)

{name}.{method} = forever
"""


@pytest.mark.parametrize("method", ["__getitem__", "score_answer"])
def test_a_task_that_never_ends_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str):
    """A task that hangs where it makes an entry, or where it scores its own answer, is stopped and named."""
    text = FOREVER.format(module="chain_sum", name="ChainSumDataset", method=method)
    (tmp_path / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(gym, "SECONDS", (4.0, 1.0))
        with pytest.raises(ValueError, match=r"'reasoning-gym/chain_sum' did not make its 2 entries .* within 6 s"):
            load_prompts({"path": "reasoning-gym/chain_sum", "size": 2})
    assert time.monotonic() - began < 30
    other = load_prompts({"path": "reasoning-gym/gcd", "size": 1})  # only that task hangs
    assert other.data_source == ("reasoning-gym/gcd",)
    if method == "score_answer":  # nothing scores where another verifier judges
        source = {"path": "reasoning-gym/chain_sum", "size": 2, "verifier": {"id": "numeric"}}
        assert len(load_prompts(source)) == 2
