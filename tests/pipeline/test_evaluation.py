"""Expected reward without sampling, greedy accuracy, and intervals."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from pipeline.evaluation import exact_reward, expected_reward_gradient, greedy_accuracy, interval
from pipeline.generation import Sampling
from pipeline.generation.transformers import TransformersGenerate
from pipeline.records import Prompts, canonical
from pipeline.rollouts import collect
from pipeline.verifiers import Verdict
from tests.oracles import logps_of_one

PAIRS = [("1+1=", "2"), ("12+3=", "15"), ("RabS", ""), ("2*2=", "4567")]


def exact(triples):
    return [Verdict(*(("correct", 1.0) if truth == text else ("incorrect", 0.0))) for _, truth, text in triples]


def test_expected_reward_is_the_product_of_token_probabilities(llama, make_prompts):
    """The chance of a correct answer is the product over its tokens and the end token, one prompt at a time."""
    expected = []
    for prompt, answer in PAIRS:
        answer_ids = [*llama.tokenizer(answer).input_ids, llama.tokenizer.eos_token_id]
        with torch.no_grad():
            expected.append(float(logps_of_one(llama, llama.tokenizer(prompt).input_ids, answer_ids).exp().prod()))
    prompts = make_prompts(PAIRS)
    assert exact_reward(llama, prompts) == pytest.approx(expected, rel=1e-4)
    assert exact_reward(llama, prompts, rows=1) == pytest.approx(expected, rel=1e-4)


def test_expected_rewards_of_all_answers_add_up(llama, make_prompts):
    """Over all answers of one character, and over going on, the chances of what follows a prompt add up to one."""
    alphabet = [llama.tokenizer.decode([i]) for i in range(2, 27)]
    answers = ["".join(p) for length in (0, 1) for p in product(alphabet, repeat=length)]
    ends = exact_reward(llama, make_prompts([("1+1=", answer) for answer in answers])).sum()
    prompt = llama.tokenizer("1+1=").input_ids
    goes_on = 0.0
    with torch.no_grad():
        first = llama.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
        for i in range(2, 27):
            second = llama.model(input_ids=torch.tensor([[*prompt, i]])).logits[0, -1].softmax(-1)
            goes_on += float(first[i] * (1 - second[1]))
    assert ends + goes_on + float(first[0]) == pytest.approx(1.0, abs=1e-5)


def test_expected_reward_is_the_mean_of_samples(llama, make_prompts):
    """2000 sampled completions are right as often as the exact value says, to four standard errors."""
    with torch.no_grad():
        llama.model.lm_head.weight.mul_(3)
    prompts = make_prompts([("1+1=", "")])
    p = exact_reward(llama, prompts)[0]
    (group,) = collect(
        prompts, TransformersGenerate(llama, batch_tokens=10**6), exact, llama.tokenizer,
        rollouts=2000, sampling=Sampling(max_new_tokens=2), seed=0, policy="p",
    )  # fmt: skip
    assert abs(np.mean(group.reward) - p) < 4 * np.sqrt(p * (1 - p) / 2000)


def test_an_answer_that_is_not_unique_is_refused(llama, make_prompts):
    """Expected reward needs exact match; another verifier is named."""
    columns = make_prompts(PAIRS).columns()
    other = Prompts.of({**columns, "verifier": (*columns["verifier"][:-1], canonical({"id": "numeric"}))})
    with pytest.raises(ValueError, match="numeric"):
        exact_reward(llama, other)


def test_greedy_accuracy_by_hand(llama, make_prompts):
    """The share of prompts whose likeliest completion is the answer."""
    generate = TransformersGenerate(llama)
    asked = make_prompts(PAIRS)
    said = {}
    greedy = Sampling(temperature=0.0, max_new_tokens=3)
    for group in collect(asked, generate, exact, llama.tokenizer, rollouts=1, sampling=greedy, seed=0, policy=""):
        said[group.prompt_uid[0]] = group.text[0]
    truths = [said[uid] if i % 2 else "0" * 9 for i, uid in enumerate(asked.prompt_uid)]
    prompts = make_prompts([(prompt, truth) for (prompt, _), truth in zip(PAIRS, truths, strict=True)])
    accuracy = greedy_accuracy(llama, prompts, generate, exact, max_new_tokens=3, stop=(), chat=False)
    assert accuracy == 0.5


def test_interval_by_hand():
    """Mean and half width of Student's interval; a single value has no width."""
    told = interval([1.0, 2.0, 6.0])
    assert told["mean"] == 3.0
    assert told["n"] == 3
    assert told["half_width"] == pytest.approx(4.30265 * np.sqrt(7) / np.sqrt(3), rel=1e-5)
    low, high = stats.t.interval(0.9, 2, loc=3.0, scale=stats.sem([1.0, 2.0, 6.0]))
    assert interval([1.0, 2.0, 6.0], level=0.9)["half_width"] == pytest.approx((high - low) / 2)
    assert interval([4.0]) == {"mean": 4.0, "half_width": None, "n": 1}


def test_an_interval_covers_at_its_level():
    """Of 2000 intervals of five normal values, 95 % hold the truth, to four standard errors."""
    rng = np.random.default_rng(0)
    told = [interval(rng.normal(2.0, 3.0, 5).tolist()) for _ in range(2000)]
    covered = np.mean([abs(t["mean"] - 2.0) <= t["half_width"] for t in told])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)


def test_the_gradient_of_the_expected_reward_is_its_slope(llama, make_prompts):
    """A small step along it changes mean P(correct) by step times squared length, to 1 %; batches of prompts add up."""
    prompts = make_prompts([("12+34=", "64"), ("R=", "1"), ("Sab=", "ab")])
    gradient, parts = expected_reward_gradient(llama, prompts), expected_reward_gradient(llama, prompts, rows=2)
    assert set(gradient) == set(llama.trainable())
    squared = sum(float((g.double() ** 2).sum()) for g in gradient.values())
    assert all(torch.allclose(gradient[name], parts[name], atol=1e-5 * squared**0.5) for name in gradient)
    size, levels = 1e-3 / squared**0.5, []
    for sign in (-1, 2):  # to one side, then to the other
        with torch.no_grad():
            for name, parameter in llama.trainable().items():
                parameter += sign * size * gradient[name]
        levels.append(exact_reward(llama, prompts).astype(float).mean())
    assert (levels[1] - levels[0]) / (2 * size) == pytest.approx(squared, rel=0.01)
