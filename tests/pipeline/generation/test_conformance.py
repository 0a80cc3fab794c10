"""Every engine keeps the same contract: one suite over all of them, on one policy."""

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from pipeline.generation import Generate, Group, Request, Sampling
from pipeline.generation.transformers import TransformersGenerate
from pipeline.policy import Policy
from tests.oracles import logps_of_one
from tests.pipeline.generation.test_transformers import full_logps, nucleus

REQUESTS = [Request(f"prompt-{i}", tuple(range(2, 3 + i)), n, 5) for i, n in enumerate([3, 4, 2, 5, 1, 4])]
TEN = Sampling(max_new_tokens=10)


@pytest.fixture(scope="module", params=["transformers", "vllm", "server"])
def of(request: pytest.FixtureRequest) -> Iterator[Callable[[Policy], Generate]]:
    """Makes each engine in turn of a policy; behind the server are always the weights of ``sampled``."""
    if request.param == "transformers":
        yield TransformersGenerate
    elif request.param == "vllm":
        engine = request.getfixturevalue("vllm_engine")
        yield lambda policy: (engine.load(policy), engine)[1]
    else:
        from pipeline.generation.server import ServerGenerate

        url = request.getfixturevalue("server_url")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KEY_OF_THE_TEST", "key-of-the-test")
            yield lambda policy: ServerGenerate(url, policy, key_variable="KEY_OF_THE_TEST")


@pytest.fixture
def engine(of: Callable[[Policy], Generate], sampled: Policy) -> Generate:
    """Each engine in turn, sampling from the same policy."""
    return of(sampled)


def by_uid(groups: Iterator[Group]) -> dict[str, Group]:
    return {group.request.prompt_uid: group for group in groups}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (0.7, 0.8), (1.3, 0.9)])
def test_logps_are_those_of_the_distribution_that_was_sampled_from(engine, sampled, temperature, top_p):
    """Each token has its log-probability under temperature and nucleus, as a float64 pass over it says, to 1e-4 nats."""
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=10)
    for group in engine(REQUESTS, sampling):
        for tokens, logp in zip(group.completion_ids, group.logp, strict=True):
            rows = full_logps(sampled, group.request.prompt_ids, tokens, temperature)
            expected = [nucleus(row, top_p)[token] for row, token in zip(rows, tokens, strict=True)]
            assert logp == pytest.approx(expected, abs=1e-4)


def test_logps_are_teacher_forced_ones(engine, sampled):
    """What an engine records is what our own teacher-forced pass says of its completion, to 1e-4 nats."""
    for group in engine(REQUESTS, Sampling(temperature=0.7, max_new_tokens=10)):
        for tokens, logp in zip(group.completion_ids, group.logp, strict=True):
            with torch.no_grad():
                again = logps_of_one(sampled, list(group.request.prompt_ids), tokens, 0.7)
            assert logp == pytest.approx(again.numpy(), abs=1e-4)


def test_every_request_comes_back_once_and_whole(engine):
    """Each request has one group of its n completions, of token ids with a float32 number each."""
    groups = list(engine(REQUESTS, TEN))
    assert sorted(g.request.prompt_uid for g in groups) == sorted(r.prompt_uid for r in REQUESTS)
    for group in groups:
        assert {len(group.completion_ids), len(group.logp), len(group.finish_reason)} == {group.request.n}
        assert len({str(tokens) for tokens in group.completion_ids}) == group.request.n  # 27^10 possible ones
        assert [x.shape for x in group.logp] == [(len(tokens),) for tokens in group.completion_ids]
        assert all(x.dtype == np.float32 for x in group.logp)
        assert all(type(token) is int for tokens in group.completion_ids for token in tokens)
    assert list(engine([], TEN)) == []


def test_a_draw_depends_on_its_identity_alone(engine):
    """A subset and another order draw the same completions; another seed or prompt_uid draws others."""
    whole = by_uid(engine(REQUESTS, TEN))
    for requests in (REQUESTS[::-1], REQUESTS[1:3]):
        for uid, group in by_uid(engine(requests, TEN)).items():
            assert group.completion_ids == whole[uid].completion_ids
            assert np.concatenate(group.logp) == pytest.approx(np.concatenate(whole[uid].logp), abs=1e-4)
    one = {"prompt_uid": "p", "prompt_ids": (2, 3, 4), "n": 4, "seed": 5}
    drawn = [next(engine([Request(**one | change)], TEN)) for change in ({}, {"prompt_uid": "q"}, {"seed": 6})]
    assert len({str(group.completion_ids) for group in drawn}) == 3


def test_fewer_samples_are_the_first_of_more(engine):
    """Completion j is keyed by j: asking for more adds completions and changes none."""
    more, fewer = (next(iter(engine([Request("p", (2, 3), n, 0)], TEN))) for n in (6, 2))
    assert more.completion_ids[:2] == fewer.completion_ids
    assert len({tuple(tokens) for tokens in more.completion_ids}) > 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.6)])
def test_frequencies_are_probabilities(engine, sampled, temperature, top_p):
    """2000 draws of one token pass a chi-square test against the distribution that was asked for."""
    prompt, requests = (5, 9), [Request(f"p{i}", (5, 9), 50, i) for i in range(40)]
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=1)
    drawn = [tokens[0] for group in engine(requests, sampling) for tokens in group.completion_ids]
    counts = np.bincount(drawn, minlength=27)
    p = np.exp(nucleus(full_logps(sampled, prompt, (0,), temperature)[0], top_p))
    assert counts.sum() == 2000 and not counts[p == 0].any()
    p = p / p.sum()
    assert chisquare(counts[p > 0], 2000 * p[p > 0]).pvalue > 1e-3


def test_greedy_takes_the_likeliest_token(engine, sampled):
    """At temperature 0 every token is the likeliest one, and its log-probability is that at temperature 1."""
    for group in engine(REQUESTS, Sampling(temperature=0.0, max_new_tokens=6)):
        assert len({tuple(tokens) for tokens in group.completion_ids}) == 1
        rows = full_logps(sampled, group.request.prompt_ids, group.completion_ids[0], 1.0)
        assert rows.argmax(axis=1).tolist() == group.completion_ids[0]
        assert group.logp[0] == pytest.approx(rows.max(axis=1), abs=1e-4)


@pytest.mark.parametrize("stop", [(), ("=",)])
def test_a_completion_ends_with_the_token_that_ended_it(engine, sampled, stop):
    """The end token, and a token with a stop character, is kept, comes last and means ``stop``; else it is full."""
    tokenizer = sampled.tokenizer
    ends = {tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(s) for s in stop)}
    (group,) = engine([Request("p", (2, 3), 120, 0)], Sampling(max_new_tokens=10, stop=stop))
    assert {"stop", "length"} == set(group.finish_reason)
    assert {tokens[-1] for tokens in group.completion_ids} >= ends
    for tokens, reason in zip(group.completion_ids, group.finish_reason, strict=True):
        assert not ends & set(tokens[:-1])
        assert (tokens[-1] in ends) == (reason == "stop")
        assert reason == "stop" or len(tokens) == 10


@pytest.mark.parametrize("named", [5, [5, 6]])
def test_the_ends_that_a_policy_names_end_a_completion(of, sampled, named):
    """What the model's generation config names beside the tokenizer's end token ends a completion, in every engine."""
    chat = Policy(copy.deepcopy(sampled.model), sampled.tokenizer)
    chat.model.generation_config.eos_token_id = named
    ends = {sampled.tokenizer.eos_token_id, *([named] if named == 5 else named)}
    (group,) = of(chat)([Request("p", (2, 3), 120, 0)], TEN)
    assert {tokens[-1] for tokens in group.completion_ids} >= ends
    for tokens, reason in zip(group.completion_ids, group.finish_reason, strict=True):
        assert not ends & set(tokens[:-1]) and (tokens[-1] in ends) == (reason == "stop")


def test_a_tokenizer_without_an_end_token_is_refused(of, sampled):
    """Its name and the remedy are in the error, before anything is sampled."""
    tokenizer = copy.deepcopy(sampled.tokenizer)
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.name_or_path = None, None, "endless"
    with pytest.raises(ValueError, match=r"tokenizer 'endless'.*has no end token.*tokenizer_config\.json"):
        next(iter(of(Policy(sampled.model, tokenizer))(REQUESTS, TEN)))


def test_a_prompt_that_does_not_fit_is_refused_by_name(engine):
    """A prompt that leaves no room for its completion is named before anything is sampled."""
    with pytest.raises(ValueError, match=r"too-long has 23 tokens.*context of 32"):
        next(iter(engine([*REQUESTS, Request("too-long", (2,) * 23, 1, 0)], TEN)))
    assert len(list(engine([Request("fits", (2,) * 22, 1, 0)], TEN))) == 1


def test_an_engine_that_is_left_half_way_goes_on(engine):
    """Groups that nobody waits for any more do not turn up in the next call."""
    for groups in (engine(REQUESTS * 10, TEN) for _ in range(2)):
        next(groups)
        groups.close()
    assert sorted(by_uid(engine(REQUESTS[:2], TEN))) == ["prompt-0", "prompt-1"]
