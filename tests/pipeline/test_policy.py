"""Checkpoints, adapters and token log-probabilities."""

import pytest
import torch

from pipeline.policy import Policy, collate, load_policy, positions, save_policy, token_logps
from tests.oracles import logps_of_one

PROMPTS, COMPLETIONS = [[2, 3, 4, 5, 6], [7], [8, 9, 10]], [[11], [12, 13, 14, 1], [15, 16]]


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(input_ids=torch.tensor(PROMPTS[:1])).logits


def test_a_saved_policy_is_the_same_when_loaded(llama, tmp_path):
    """Saving and loading keeps every logit and the tokenizer."""
    save_policy(llama, tmp_path)
    again = load_policy(tmp_path, attention="eager")
    assert torch.equal(logits(again), logits(llama))
    assert again.tokenizer("12+3=").input_ids == llama.tokenizer("12+3=").input_ids
    assert again.tokenizer.decode(again.tokenizer("RabcS").input_ids) == "RabcS"
    assert (again.pad_id, again.context_length, again.device.type) == (0, 32, "cpu")
    assert again.trainable().keys() == llama.trainable().keys()
    assert not list(tmp_path.glob("*.bin"))


def test_tied_parameters_appear_once(qwen3, tmp_path):
    """Tied embeddings are one trainable parameter, before and after a round trip."""
    assert "lm_head.weight" not in qwen3.trainable()
    save_policy(qwen3, tmp_path)
    again = load_policy(tmp_path, attention="eager")
    assert again.trainable().keys() == qwen3.trainable().keys()
    assert torch.equal(logits(again), logits(qwen3))


def test_an_adapter_is_the_same_when_loaded(llama, tmp_path):
    """A new adapter changes nothing and alone is trainable; saved and loaded on its base it gives the same logits."""
    save_policy(llama, tmp_path / "base")
    lora = {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}
    policy = load_policy(tmp_path / "base", lora=lora, seed=1)
    plain = logits(load_policy(tmp_path / "base"))
    assert torch.equal(logits(policy), plain)
    assert all("lora_" in name for name in policy.trainable())
    assert len(policy.trainable()) == 2 * 2 * 2
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1)
    save_policy(policy, tmp_path / "adapter")
    again = load_policy(tmp_path / "base", adapter=tmp_path / "adapter")
    assert not torch.equal(logits(again), plain)
    assert torch.equal(logits(again), logits(policy))
    assert again.trainable().keys() == policy.trainable().keys()
    assert again.context_length == 32


def test_a_new_adapter_is_drawn_from_its_seed(llama, tmp_path):
    """The same seed draws the same adapter, another seed another one."""
    save_policy(llama, tmp_path)
    lora = {"rank": 2, "alpha": 4, "targets": ["q_proj"]}
    a, b, c = (
        torch.cat([p.flatten() for p in load_policy(tmp_path, lora=lora, seed=s).trainable().values()])
        for s in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_missing_checkpoint_is_named(tmp_path):
    """A name that no cache knows, and a folder that is no checkpoint, are named with the remedy."""
    with pytest.raises(FileNotFoundError, match=r"no/such-policy.*is not there"):
        load_policy("no/such-policy")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_policy(tmp_path)


def test_collate_by_hand():
    """Prompts are padded on the left, completions on the right, and masks tell what is real."""
    batch = collate([[5, 6], [7]], [[8], [9, 1]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 8, 0], [0, 7, 9, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [0, 1, 1, 1]]
    assert batch.mask.tolist() == [[True, False], [True, True]]
    assert positions(batch.attention_mask)[:, :3].tolist() == [[0, 1, 2], [0, 0, 1]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_padding_does_not_change_logps(request, tmp_path, name, attention, temperature):
    """A padded batch gives each row's own log-probabilities, to 1e-5 nats, and zero where there is no token."""
    save_policy(request.getfixturevalue(name), tmp_path)
    policy = load_policy(tmp_path, attention=attention)
    batch = collate(PROMPTS, COMPLETIONS, policy.pad_id)
    with torch.no_grad():
        logp = token_logps(policy.model, batch, temperature=temperature)
        for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
            alone = logps_of_one(policy, prompt, completion, temperature)
            assert logp[row, : len(completion)].numpy() == pytest.approx(alone.numpy(), abs=1e-5)
            assert not logp[row, len(completion) :].any()
    assert logp.dtype == torch.float32


def test_greedy_rollouts_are_scored_at_temperature_one(llama):
    """Temperature 0 stands for greedy decoding, whose log-probabilities are those at temperature 1."""
    batch = collate(PROMPTS, COMPLETIONS, llama.pad_id)
    with torch.no_grad():
        assert torch.equal(token_logps(llama.model, batch, temperature=0.0), token_logps(llama.model, batch))


def test_a_bfloat16_policy_gives_float32_logps(llama, tmp_path):
    """The dtype is that of the weights; log-probabilities stay float32 and near."""
    save_policy(llama, tmp_path)
    policy = load_policy(tmp_path, dtype="bfloat16")
    batch = collate(PROMPTS, COMPLETIONS, 0)
    with torch.no_grad():
        rough, exact = token_logps(policy.model, batch), token_logps(llama.model, batch)
    assert next(policy.model.parameters()).dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    assert float((rough - exact).abs().max()) < 0.1


def test_an_adapter_or_a_target_that_is_not_there_is_named(llama, tmp_path):
    """A folder without an adapter, and targets that no layer has, are refused with what would do."""
    save_policy(llama, tmp_path / "base")
    with pytest.raises(ValueError, match=r"adapter = '.*nowhere' holds no adapter_config"):
        load_policy(tmp_path / "base", adapter=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"lora\.targets = \['query'\] names no layer.*'q_proj'"):
        load_policy(tmp_path / "base", lora={"rank": 2, "alpha": 4, "targets": ["query"]})
