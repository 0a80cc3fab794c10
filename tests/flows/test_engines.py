"""Engines behind a desk: what the settings become, and whose weights each training step samples from."""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flows import evidence
from flows.config import Config
from flows.curriculum import run_seed
from flows.do import Do, Reached
from flows.engines import Engines
from flows.progress import Reporter
from flows.run import open_desk, plain
from pipeline.embedded.warm_start import untrained_policy
from pipeline.policy import Policy, collate, token_logps
from pipeline.records import Rollouts
from tests.pipeline.generation.conftest import CACHE, NO_VLLM

Settle = Callable[..., Config]


@pytest.fixture
def vllm_events(monkeypatch) -> list[Any]:
    """What happens at the door to vLLM on a machine with an accelerator: options of a start, sleeping, waking, room."""
    events: list[Any] = []

    class Started:
        def __init__(self, **options: Any) -> None:
            events.append(options)

        def sleep(self, level: int) -> None:
            events.append("sleep")

        def wake_up(self) -> None:
            events.append("wake")

    monkeypatch.setattr("pipeline.generation.vllm._import", lambda: Started)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("room"))
    return events


def make(config: Config) -> Any:
    """The engine of some settings, without a run around it."""
    return Engines(SimpleNamespace(config=config, reporter=Reporter(quiet=True)))._make()


def test_what_accelerators_share_reaches_vllm(settle: Settle, vllm_events: list[Any]):
    """Tensor parallelism, its back end, sleep, dtype and memory are options of vLLM's start; unasked, half is left free."""
    shared = {"engine": "vllm", "tensor_parallel_size": 2, "distributed_backend": "ray", "sleep": True, "sequences": 9}
    policy = {"device": "cuda", "dtype": "bfloat16"}
    make(settle(generation=shared, policy=policy)).load(untrained_policy(0))
    make(settle(generation=shared | {"memory": 0.8, "cache": 2.0}, policy=policy)).load(untrained_policy(0))
    first, second = (event for event in vllm_events if isinstance(event, dict))
    expected = {"tensor_parallel_size": 2, "distributed_executor_backend": "ray", "enable_sleep_mode": True,
                "max_num_seqs": 9, "dtype": "bfloat16", "max_model_len": 32, "gpu_memory_utilization": 0.5}  # fmt: skip
    assert {name: first[name] for name in expected} == expected
    assert not {"kv_cache_memory_bytes", "enforce_eager"} & set(first)
    assert second["gpu_memory_utilization"] == 0.8 and second["kv_cache_memory_bytes"] == 2**31


def test_memory_is_given_back_before_vllm_takes_it(settle: Settle, vllm_events: list[Any]):
    """Each start and each waking on an accelerator comes after torch's idle memory was given back."""
    engine = make(settle(generation={"engine": "vllm", "sleep": True}, policy={"device": "cuda"}))
    engine.load(untrained_policy(0))
    engine.sleep()
    engine.wake()
    assert ["start" if isinstance(e, dict) else e for e in vllm_events] == ["room", "start", "sleep", "room", "wake"]


def test_an_adapter_that_rounding_would_hide_is_warned_of(settle: Settle):
    """vLLM with an adapter in bfloat16 is warned of with the remedies; in float32, or without an adapter, nothing is said."""
    generation, lora = {"engine": "vllm"}, {"rank": 4}
    with pytest.warns(UserWarning, match=r"merged.*engine = 'transformers'.*dtype = 'float32'.*larger train\.lr"):
        make(settle(generation=generation, policy={"lora": lora, "dtype": "bfloat16"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(settle(generation=generation, policy={"lora": lora}))
        make(settle(generation=generation, policy={"dtype": "bfloat16"}))


def off(policy: Policy, rollouts: Rollouts) -> float:
    """Mean absolute difference [nats a token] of the recorded log-probabilities from those of our own pass."""
    batch = collate(rollouts.prompt_ids, rollouts.completion_ids, policy.pad_id)
    with torch.no_grad():
        expected = token_logps(policy.model, batch).numpy()
    pairs = zip(rollouts.logp_old, expected, strict=True)
    return float(np.concatenate([np.abs(x - row[: len(x)]) for x, row in pairs]).mean())


@pytest.mark.parametrize("adapter", [None, {"rank": 4}])
def test_each_step_samples_from_the_policy_of_that_step(settle: Settle, tmp_path: Path, monkeypatch, adapter):
    """Both steps of a stage, sampled by vLLM, record what the policy says as it is then, and not as it was a step before."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip(NO_VLLM)
    config = settle(
        generation={"engine": "vllm", "sequences": 64, "cache": CACHE},
        train={"stages": [2], "save_every": 2, "lr": 1e-2},
        policy={"lora": adapter},
        diem={"strength": 0.0},
    )
    made, roll = [], evidence.roll

    def watched(desk: Any, policy: str, prompts: Any, **options: Any) -> Rollouts:
        found = roll(desk, policy, prompts, **options)
        made.append((options["step"], copy.deepcopy(desk.load(policy)), found))
        return found

    monkeypatch.setattr(evidence, "roll", watched)
    with open_desk(config, tmp_path / "run", Reporter(quiet=True)) as desk, pytest.raises(Reached):
        run_seed(Do(desk, plain, until=("train", 0)))
    (one, before, first), (two, after, second) = made
    assert (one, two) == (1, 2)
    assert off(before, first) < 1e-4 and off(after, second) < 1e-4
    assert off(before, second) > 1e-2
