"""A run that takes seconds: a barely warm policy, two dozen prompts labelled with its own answers, six steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from flows.config import Config, load_config
from flows.do import STEPS
from flows.progress import Reporter
from flows.run import run

SETS = {
    "pool": {"easy": 6, "add": 6, "rev": 6, "sort": 6},
    "add": {"add": 4},
    "rev": {"rev": 4},
    "test": {"add": 4, "rev": 4},
}
BATCHES = 40

CONFIG = """\
name = "tiny"

[policy]
checkpoint = "{inputs}/checkpoint"
attention = "eager"
threads = 1

[prompts]
pool = [{{ path = "{inputs}/pool.jsonl", data_source = "tiny" }}]
test = [{{ path = "{inputs}/test.jsonl", data_source = "tiny" }}]

[prompts.validation]
add = [{{ path = "{inputs}/add.jsonl", data_source = "tiny" }}]
rev = [{{ path = "{inputs}/rev.jsonl", data_source = "tiny" }}]

[sampling]
max_new_tokens = 4

[verifiers]
processes = 1
timeout = 3.0

[evidence]
validation_rollouts = 4
shard = 16

[features]
dim = 256

[select]
share = 0.34

[diem]
strength = 0.25

[train]
stages = [2, 2, 2]
batch = 4
rollouts = 4
lr = 1e-4
warmup = 1
save_every = 1

[evaluate]
exact = true
"""


def make_inputs(folder: Path) -> Path:
    """Write a checkpoint, a pool, two validation sets and a test set, and return their folder.

    The policy has seen each prompt with its answer and with another one, equally often, so that it is right sometimes.
    """
    import torch

    from pipeline.embedded.families import distinct
    from pipeline.embedded.warm_start import untrained_policy
    from pipeline.policy import collate, save_policy, token_logps

    rng, taken, seen = np.random.default_rng(0), set(), []
    for name, families in SETS.items():
        drawn = [(family, *pair) for family, n in families.items() for pair in distinct(family, n, rng, taken)]
        rows = [{"prompt": p, "ground_truth": answer[:2], "ability": family} for family, p, answer in drawn]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        seen += [(row["prompt"], text) for row in rows for text in (row["ground_truth"], "77")]
    policy = untrained_policy(0)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=2e-3)
    end = policy.tokenizer.eos_token_id
    asked = [policy.tokenizer(prompt).input_ids for prompt, _ in seen]
    batch = collate(asked, [[*policy.tokenizer(text).input_ids, end] for _, text in seen], policy.pad_id)
    for _ in range(BATCHES):
        loss = -token_logps(policy.model, batch).sum() / batch.mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_policy(policy, folder / "checkpoint")
    return folder


def configure(inputs: Path, folder: Path, **changes: Any) -> Config:
    """Return the tiny settings, written to a file and read back, with whole sections or keys of them changed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.toml"
    file.write_text(CONFIG.format(inputs=inputs))
    settings = load_config(file).model_dump()
    for name, value in changes.items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    return Config.model_validate(settings)


def quiet(config: Config, folder: Path, **options: Any) -> dict[str, Any]:
    """Run plainly, without a word."""
    return run(config, folder, Reporter(quiet=True), **options)


def timeless(value: Any) -> Any:
    """Return a summary without anything that a clock said."""
    if isinstance(value, list):
        return [timeless(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {name: timeless(item) for name, item in value.items() if "seconds" not in name}


def keys_of(folder: Path) -> set[str]:
    """Return every key that the run's store holds."""
    from stores import open_store

    return set(open_store(folder / "store").catalog.keys())


__all__ = ["CONFIG", "STEPS", "configure", "keys_of", "make_inputs", "quiet", "timeless"]
