"""Packed rows give what separate rows give."""

import numpy as np
import pytest
import torch

from pipeline import packing
from pipeline.packing import pack, packed_logps, passes
from pipeline.policy import collate, token_logps


@pytest.mark.parametrize("name", ["llama", "qwen3", "adapted"])
@pytest.mark.parametrize("row_tokens", [1, 20, 1024])
def test_packed_log_probabilities_are_those_of_separate_rows(name, make_rollouts, row_tokens, monkeypatch, request):
    """Whatever shares a row, each completion token has the log-probability of the ordinary layout."""
    monkeypatch.setattr(packing, "ROW_TOKENS", row_tokens)
    policy = request.getfixturevalue(name)
    rollouts = make_rollouts(policy)
    rows = pack(rollouts)
    order = [i for row in rows for i in row.rollouts]
    ordered = rollouts.take(order)
    with torch.no_grad():
        packed = packed_logps(policy, rollouts, rows)
        batch = collate(ordered.prompt_ids, ordered.completion_ids, policy.pad_id)
        separate = token_logps(policy.model, batch, temperature=rollouts.temperature[0])
    assert packed.shape == separate.shape
    assert torch.allclose(packed, separate, atol=2e-5)


def test_every_rollout_is_packed_once_and_prompts_stay_together(llama, make_rollouts, monkeypatch):
    """Rows hold each rollout exactly once, one prompt each, prompts in order of first appearance."""
    monkeypatch.setattr(packing, "ROW_TOKENS", 16)
    rollouts = make_rollouts(llama)
    rows = pack(rollouts)
    assert sorted(i for row in rows for i in row.rollouts) == list(range(len(rollouts)))
    assert [row.prompt for row in rows] == sorted(row.prompt for row in rows)
    uids = list(rollouts.groups())
    assert all(rollouts.prompt_uid[i] == uids[row.prompt] for row in rows for i in row.rollouts)


@pytest.mark.parametrize("micro_tokens", [1, 30, 60, 10_000])
def test_passes_hold_whole_prompts_or_split_one(llama, make_rollouts, monkeypatch, micro_tokens):
    """Every row is in one pass; only a prompt that alone exceeds the limit takes several passes."""
    monkeypatch.setattr(packing, "ROW_TOKENS", 16)
    rows = pack(make_rollouts(llama))
    chunks = list(passes(rows, micro_tokens))
    assert [row for parts in chunks for part in parts for row in part] == rows
    for parts in chunks:
        if len(parts) > 1:
            assert len({row.prompt for part in parts for row in part}) == 1
    owners = [{row.prompt for part in parts for row in part} for parts in chunks]
    assert sum(map(len, owners)) == len(set().union(*owners))


def test_different_prompt_tokens_under_one_uid_are_refused(llama, make_rollouts):
    """A prompt whose rollouts were rendered in two ways is named."""
    from dataclasses import replace

    rollouts = make_rollouts(llama)
    changed = replace(rollouts, prompt_ids=((*rollouts.prompt_ids[0], 3), *rollouts.prompt_ids[1:]))
    with pytest.raises(ValueError, match=rollouts.prompt_uid[0]):
        pack(changed)


def test_mixed_temperatures_are_refused(llama, make_rollouts):
    """Rollouts of two temperatures have no common sampling distribution."""
    from dataclasses import replace

    rollouts = make_rollouts(llama)
    mixed = replace(rollouts, temperature=tuple(np.linspace(0.5, 1.0, len(rollouts)).tolist()))
    with pytest.raises(ValueError, match="temperatures"):
        packed_logps(llama, mixed, pack(mixed))
