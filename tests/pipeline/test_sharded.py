"""Features made by two processes that share the weights: the same sketches as one process makes."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import packing
from pipeline.features import projection_for, sketch_gradients
from pipeline.packing import Row
from pipeline.policy import load_policy, save_policy
from pipeline.scope import named
from pipeline.sharded import _deal

ROOT = Path(__file__).parents[2]
SPARSE = {"dim_out": 512, "kind": "sparse", "seed": 3}
SINGLE = {"prompts": 1, "samples": 1, "drift": 0.0}
CASES = {
    # name: checkpoint, what is loaded, and what is unusual; "groups" makes one batch of rollouts an entry
    "llama": ("llama", {}, {"groups": [{"prompts": 5}, {"prompts": 2, "seed": 1}, {"prompts": 3, "seed": 2}]}),
    "tied": ("qwen3", {}, {"groups": [{"prompts": 4}, SINGLE], "objective": "rft"}),
    "several passes": (
        "qwen3",
        {"checkpointing": True},
        {"row_tokens": 8, "micro_tokens": 24, "groups": [{"prompts": 4, "samples": 9}, {"prompts": 1, "samples": 5}]},
    ),
    "adapter": ("llama", {"adapter": "adapter"}, {"groups": [{"prompts": 3}, {"prompts": 3, "rewards": [0.0]}]}),
    "fresh adapter": (
        "llama",
        {"lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "up_proj"]}, "dtype": "bfloat16", "seed": 7},
        {"tolerance": 0.05},
    ),
    "factored": ("llama", {}, {"projection": {"dim_out": 300, "kind": "factored", "seed": 1}}),
    "layers": (
        "llama",
        {},
        {"layers": ["*.1.*.v_proj.*", "lm_head.*"], "projection": SPARSE | {"keep": 0.5}, "micro_tokens": 60},
    ),
}


@pytest.fixture
def checkpoints(request, tmp_path):
    """The folder with the fixtures' policies as checkpoints, and the policies."""
    policies = {}
    for name, folder in {"llama": "llama", "qwen3": "qwen3", "adapted": "adapter"}.items():  # adapting changes llama
        policies[folder] = request.getfixturevalue(name)
        save_policy(policies[folder], tmp_path / folder)
        if name == "llama":
            policies[name] = load_policy(tmp_path / folder)
    return tmp_path, policies


@pytest.fixture
def cases(checkpoints, make_rollouts):
    """Every case, complete, with its rollouts."""
    folder, policies = checkpoints
    made = {}
    for name, (checkpoint, load, unusual) in CASES.items():
        case = {"objective": "grpo_optimal_baseline", "row_tokens": 1024, "micro_tokens": 4096, "layers": []}
        case |= {"projection": SPARSE, "tolerance": 1e-5, "groups": [{}], "checkpoint": str(folder / checkpoint)}
        case |= unusual | {"load": dict(load)}
        if "adapter" in load:
            case["load"]["adapter"] = str(folder / load["adapter"])
        case["rollouts"] = [make_rollouts(policies[checkpoint], **options) for options in case["groups"]]
        made[name] = case
    return made


def alone(case, number, monkeypatch):
    """Return the sketches of one process, its log-probabilities by rollout, its projection and its parameters."""
    monkeypatch.setattr(packing, "ROW_TOKENS", case["row_tokens"])
    load = case["load"] | ({"adapter": Path(case["load"]["adapter"])} if "adapter" in case["load"] else {})
    policy, seen = load_policy(case["checkpoint"], **load), {}
    scope = named(policy.model, case["layers"]) if case["layers"] else None
    projection = projection_for(policy, scope=scope, **case["projection"])

    def watch(group, logps):
        for uid, sample, row in zip(group.prompt_uid, group.sample, logps, strict=True):
            seen[f"{uid}/{sample}"] = row

    uids, rows = sketch_gradients(
        policy,
        case["rollouts"][number],
        case["objective"],
        projection,
        micro_tokens=case["micro_tokens"],
        scope=scope,
        watch=watch,
    )
    return uids, rows, seen, projection, policy


def test_two_ranks_give_the_sketches_of_one_process(cases, tmp_path, monkeypatch):
    """For whole models, tied ones, adapters, named layers and groups in several passes, both ranks have all sketches."""
    plain = {
        name: case | {"rollouts": [asdict(rollouts) for rollouts in case["rollouts"]]} for name, case in cases.items()
    }
    (tmp_path / "cases.json").write_text(json.dumps(plain))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*launch, "--nproc-per-node=2", "-m", "tests.pipeline.sharded_ranks", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, case in cases.items():
        for number in range(len(case["rollouts"])):
            uids, rows, seen, projection, policy = alone(case, number, monkeypatch)
            size = max(float(np.abs(rows).max()), 1e-30)
            held = 0
            for rank in range(2):
                facts = json.loads((tmp_path / f"{name}-{number}-{rank}.json").read_text())
                found = np.load(tmp_path / f"{name}-{number}-{rank}.npy")
                assert facts["uids"] == uids, name
                assert found / size == pytest.approx(rows / size, abs=case["tolerance"]), (name, number, rank)
                assert facts["identity"] == json.dumps(projection.identity), name
                assert facts["trainable"] == len(policy.trainable()), name
                assert set(facts["seen"]) == set(seen), name
                for one, logp in seen.items():
                    assert facts["seen"][one][: len(logp)] == pytest.approx(logp, abs=case["tolerance"]), (name, one)
                held += facts["held"]
                assert facts["held"] <= 0.6 * sum(p.numel() for p in policy.model.parameters()), name
            assert held == sum(p.numel() for p in policy.model.parameters()), name


@given(
    groups=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=4), min_size=1, max_size=20),
    micro_tokens=st.integers(1, 300),
    ranks=st.integers(1, 5),
)
def test_every_row_is_dealt_once_within_the_budget(groups, micro_tokens, ranks):
    """Each row is in one pass; a pass of several rows keeps the budget; a group that fits one pass is never divided."""
    rows = [Row(prompt, (prompt, k), tokens) for prompt, group in enumerate(groups) for k, tokens in enumerate(group)]
    small, large = _deal(rows, micro_tokens, ranks)
    assert sorted(map(id, (r for made in [*small, *(p for parts in large for p in parts)] for r in made))) == sorted(
        map(id, rows)
    )
    for made in [*small, *(part for parts in large for part in parts)]:
        assert len(made) == 1 or len(made) * max(row.tokens for row in made) <= micro_tokens
    for parts in large:
        group = [row for part in parts for row in part]
        assert {row.prompt for row in group} == {group[0].prompt}
        assert len(group) * max(row.tokens for row in group) > micro_tokens


@given(prompts=st.integers(1, 40), ranks=st.integers(1, 5))
def test_equal_groups_are_dealt_evenly(prompts, ranks):
    """Where one pass a rank is enough, no rank has more than its even share of equal groups, and nobody has two passes."""
    small, large = _deal([Row(p, (p,), 10) for p in range(prompts)], 10_000, ranks)
    assert not large and len(small) <= ranks
    assert max(map(len, small)) <= -(-prompts // ranks) * 1.2 + 1
