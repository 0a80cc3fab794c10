"""The embedded policy, untrained and after a few batches."""

import torch

from pipeline.embedded.families import ALPHABET
from pipeline.embedded.warm_start import character_tokenizer, untrained_policy, warm_start


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_one_token_a_character():
    """Every character is one token and comes back from its id; the end and padding tokens are apart."""
    tokenizer = character_tokenizer()
    ids = tokenizer(ALPHABET).input_ids
    assert ids == list(range(2, 2 + len(ALPHABET)))
    assert tokenizer.decode(ids) == ALPHABET
    assert (
        tokenizer.decode([*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], skip_special_tokens=True) == ALPHABET
    )
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_weights_are_a_function_of_the_seed():
    """The same seed makes the same weights, whatever was drawn before; another seed makes others."""
    first = untrained_policy(3)
    torch.rand(7)
    assert same(first, untrained_policy(3))
    assert not same(first, untrained_policy(4))
    assert sum(p.numel() for p in first.model.parameters()) == 335_232


def test_warm_start_learns_and_repeats():
    """A few batches move the policy, the same way each time, and progress is told after each."""
    told = []
    first = warm_start(1, batches=3, batch=8, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert not first.model.training
    assert not same(first, untrained_policy(1))
    assert same(first, warm_start(1, batches=3, batch=8, progress=lambda done, total: None))
