"""Sampling with Transformers: true log-probabilities, draws by identity, honest endings."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from pipeline.generation import Request, Sampling
from pipeline.generation.endings import end_tokens
from pipeline.generation.transformers import TransformersGenerate
from tests.oracles import logps_of_one

REQUESTS = [Request(f"prompt-{i}", tuple(range(2, 3 + i)), n, 5) for i, n in enumerate([3, 4, 2, 5])]
TEN = Sampling(max_new_tokens=10)


def generate(policy, requests=REQUESTS, sampling=TEN, **options):
    return {g.request.prompt_uid: g for g in TransformersGenerate(policy, **options)(requests, sampling)}


def nucleus(logp, top_p):
    """Log-probabilities of the smallest set of tokens with mass ``top_p``, token by token."""
    p, kept, mass = np.exp(logp), [], 0.0
    for token in sorted(range(len(p)), key=lambda v: -p[v]):
        if mass >= top_p:
            break
        kept.append(token)
        mass += p[token]
    out = np.full(len(p), -np.inf)
    out[kept] = logp[kept] - np.log(mass)
    return out


def full_logps(policy, prompt, completion, temperature):
    """Log-probabilities of the whole vocabulary at each position of one completion, without padding or cache."""
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
    return (logits.double() / temperature).log_softmax(-1).numpy()[len(prompt) - 1 : -1]


@pytest.mark.parametrize("name", ["llama", "qwen3", "adapted"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_logps_are_teacher_forced_ones(request, name, temperature):
    """What is recorded while sampling is what the policy says of the finished completion alone, to 1e-4 nats."""
    policy = request.getfixturevalue(name)
    for group in generate(policy, sampling=Sampling(temperature=temperature, max_new_tokens=10)).values():
        for tokens, logp in zip(group.completion_ids, group.logp, strict=True):
            with torch.no_grad():
                again = logps_of_one(policy, list(group.request.prompt_ids), tokens, temperature)
            assert logp == pytest.approx(again.numpy(), abs=1e-4)


def test_recorded_logps_are_those_of_the_nucleus(llama):
    """With top_p = 0.8 the recorded value is renormalised over the nucleus, and no token outside it is drawn."""
    for group in generate(llama, sampling=Sampling(temperature=0.7, top_p=0.8, max_new_tokens=10)).values():
        for tokens, logp in zip(group.completion_ids, group.logp, strict=True):
            rows = full_logps(llama, group.request.prompt_ids, tokens, 0.7)
            expected = [nucleus(row, 0.8)[token] for row, token in zip(rows, tokens, strict=True)]
            assert logp == pytest.approx(expected, abs=1e-4)


def same(a, b):
    return a.completion_ids == b.completion_ids and a.finish_reason == b.finish_reason


def test_a_draw_depends_on_its_identity_alone(llama):
    """A subset, another order, other batch mates and smaller batches draw the same completions."""
    whole = generate(llama)
    assert list(whole) == [r.prompt_uid for r in REQUESTS]
    for requests, tokens in ((REQUESTS[::-1], 16_384), (REQUESTS[1:3], 16_384), (REQUESTS, 1), (REQUESTS, 100)):
        part = generate(llama, requests, batch_tokens=tokens)
        assert set(part) == {r.prompt_uid for r in requests}
        assert all(same(group, whole[uid]) for uid, group in part.items())


def test_fewer_samples_are_the_first_of_more(llama):
    """Completion j is keyed by j: asking for more adds completions and changes none; logps agree to 1e-5."""
    more, fewer = (next(iter(generate(llama, [Request("p", (2, 3), n, 0)]).values())) for n in (6, 2))
    assert more.completion_ids[:2] == fewer.completion_ids
    assert np.concatenate(more.logp[:2]) == pytest.approx(np.concatenate(fewer.logp), abs=1e-5)


@pytest.mark.parametrize("change", [{"prompt_uid": "other"}, {"seed": 6}])
def test_another_identity_is_another_draw(llama, change):
    """Another prompt_uid or seed draws other completions of the same tokens."""
    one = {"prompt_uid": "p", "prompt_ids": (2, 3, 4), "n": 4, "seed": 5}
    first, second = (next(iter(generate(llama, [Request(**r)]).values())) for r in (one, one | change))
    assert first.completion_ids != second.completion_ids
    assert len({tuple(tokens) for tokens in first.completion_ids}) > 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (0.7, 0.6)])
def test_frequencies_are_probabilities(llama, temperature, top_p):
    """4000 draws of one token pass a chi-square test against the distribution that was asked for."""
    n, prompt = 4000, (5, 9)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=1)
    (group,) = generate(llama, [Request("p", prompt, n, 0)], sampling, batch_tokens=10**6).values()
    counts = np.bincount([tokens[0] for tokens in group.completion_ids], minlength=27)
    p = np.exp(nucleus(full_logps(llama, prompt, (0,), temperature)[0], top_p))
    assert not counts[p == 0].any()
    p = p / p.sum()
    assert chisquare(counts[p > 0], n * p[p > 0]).pvalue > 1e-3


def test_greedy_takes_the_likeliest_token(llama):
    """At temperature 0 every token is the likeliest one, and its log-probability is that at temperature 1."""
    for group in generate(llama, sampling=Sampling(temperature=0.0, max_new_tokens=6)).values():
        assert len({tuple(tokens) for tokens in group.completion_ids}) == 1
        rows = full_logps(llama, group.request.prompt_ids, group.completion_ids[0], 1.0)
        assert rows.argmax(axis=1).tolist() == group.completion_ids[0]
        assert group.logp[0] == pytest.approx(rows.max(axis=1), abs=1e-4)


def test_a_completion_ends_with_the_token_that_ended_it(llama):
    """An end token is kept, comes last and means ``stop``; a completion without one is full and means ``length``."""
    end = llama.tokenizer.eos_token_id
    (group,) = generate(llama, [Request("p", (2, 3), 200, 0)]).values()
    assert {"stop", "length"} == set(group.finish_reason)
    for tokens, logp, reason in zip(group.completion_ids, group.logp, group.finish_reason, strict=True):
        assert len(tokens) == len(logp)
        assert logp.dtype == np.float32
        assert end not in tokens[:-1]
        assert (tokens[-1] == end) == (reason == "stop")
        assert reason == "stop" or len(tokens) == 10


def test_a_stop_character_ends_a_completion(llama):
    """A token with a stop character ends the completion, is kept, and counts as ``stop``."""
    stop, end = llama.tokenizer.convert_tokens_to_ids("="), llama.tokenizer.eos_token_id
    (group,) = generate(llama, [Request("p", (2, 3), 200, 0)], Sampling(max_new_tokens=10, stop=("=",))).values()
    last = [tokens[-1] for tokens in group.completion_ids]
    assert stop in last
    assert all(stop not in tokens[:-1] for tokens in group.completion_ids)
    assert [token in (stop, end) for token in last] == [reason == "stop" for reason in group.finish_reason]
    with pytest.raises(ValueError, match="single characters"):
        end_tokens(llama.tokenizer, (end,), ("ab",))


def test_a_prompt_that_does_not_fit_is_refused_by_name(llama):
    """A prompt that leaves no room for its completion is named before anything is sampled."""
    long = Request("too-long", (2,) * 23, 1, 0)
    with pytest.raises(ValueError, match=r"too-long has 23 tokens.*context of 32"):
        generate(llama, [*REQUESTS, long])
    assert generate(llama, [Request("fits", (2,) * 22, 1, 0)])


def test_no_request_yields_nothing(llama):
    """Nothing asked, nothing sampled."""
    assert generate(llama, []) == {}
