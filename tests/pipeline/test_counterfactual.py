"""What a prompt does to the expected reward: against the first order, against retraining by hand, and without a trace."""

import numpy as np
import pytest
import torch

from pipeline.counterfactual import (
    Gradient,
    alignments,
    leave_one_out,
    policy_gradient,
    restored,
    step_effects,
)
from pipeline.evaluation import expected_reward_gradient
from pipeline.policy import Policy
from pipeline.records import Prompts, canonical
from tests.oracles import gradients_by_loop, logps_of_one

PAIRS = [("1+1=", "2"), ("12+3=", "15"), ("RabS", "ab")]
OBJECTIVE = "grpo_sequence"


@pytest.fixture
def held_out(make_prompts):
    """Two sets of unequal size."""
    return {"validation": make_prompts(PAIRS[:2]), "test": make_prompts(PAIRS[2:])}


@pytest.fixture
def likely(llama: Policy) -> Policy:
    """A policy that gives the answers a chance worth measuring."""
    with torch.no_grad():
        for i in (1, *llama.tokenizer("215ab").input_ids):
            llama.model.lm_head.weight[i] *= 3
    return llama


def level(policy, prompts) -> float:
    """Mean P(correct), one answer at a time."""
    found = []
    for messages, answer in zip(prompts.messages, prompts.ground_truth, strict=True):
        asked = policy.tokenizer(messages.split('"content":"')[1].split('"')[0]).input_ids
        ids = [*policy.tokenizer(answer).input_ids, policy.tokenizer.eos_token_id]
        found.append(float(logps_of_one(policy, asked, ids).detach().double().sum().exp()))
    return float(np.mean(found))


def weights(policy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def same(a, b) -> bool:
    """Equal bit for bit: the sign of a zero counts."""
    return all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)


def test_the_weights_are_given_back_bit_for_bit(llama, make_rollouts, held_out):
    """After steps, after retrainings, and after an error in between, every weight is the one it was."""
    rollouts, before = make_rollouts(llama), weights(llama)
    moved = []

    def watch(n):
        moved.append(same(before, weights(llama)))

    step_effects(llama, rollouts, held_out, objective=OBJECTIVE, advance=watch)
    leave_one_out(llama, rollouts, held_out, objective=OBJECTIVE, steps=2, advance=watch)
    assert moved == [True] * (3 + 3 + 1)
    with pytest.raises(KeyboardInterrupt), restored(llama), torch.no_grad():
        llama.model.lm_head.weight.mul_(1.5)
        raise KeyboardInterrupt
    assert same(before, weights(llama))


def test_a_step_has_the_length_that_it_says(likely, make_rollouts, held_out):
    """A unit step moves the weights by h of their norm, a raw one by h times the gradient, whatever the prompt."""
    rollouts = make_rollouts(likely, prompts=2)
    before, moved = weights(likely), {}
    norm = sum(float(w.square().sum()) for w in before.values()) ** 0.5
    gradients = [policy_gradient(likely, rollouts.take(rows), OBJECTIVE) for rows in rollouts.groups().values()]
    lengths = [sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5 for gradient in gradients]
    forward = likely.model.forward

    def spy(*args, **kwargs):
        now = weights(likely)
        moved[round(sum(float((now[n] - before[n]).double().square().sum()) for n in now) ** 0.5, 6)] = True
        return forward(*args, **kwargs)

    likely.model.forward = spy
    step_effects(likely, rollouts, held_out, objective=OBJECTIVE, size={"unit": 1e-3, "raw": 1e-2})
    expected = sorted({0.0, 1e-3 * norm, *(1e-2 * length for length in lengths)})
    assert sorted(moved) == pytest.approx(expected, rel=1e-3)


def test_small_steps_do_what_the_first_order_says(likely, make_rollouts, held_out):
    """As the step goes to zero, the change of the expected reward is the inner product with its gradient; the error falls with it."""
    rollouts = make_rollouts(likely, prompts=4)
    truth = {name: expected_reward_gradient(likely, prompts) for name, prompts in held_out.items()}
    found = alignments(likely, rollouts, truth, objective=OBJECTIVE)
    norm = sum(float(w.square().sum()) for w in weights(likely).values()) ** 0.5
    errors = []
    for h in (4e-5, 4e-6):
        effects = step_effects(likely, rollouts, held_out, objective=OBJECTIVE, size={"unit": h, "raw": h})
        for name in held_out:
            first = {"unit": h * norm * found[name] / found["norm"], "raw": h * found[name]}
            errors.append(max(np.abs(effects[k][name] - first[k]).max() / np.abs(first[k]).max() for k in first))
    assert max(errors[2:]) < 0.05
    assert errors[2] < 0.3 * errors[0] and errors[3] < 0.3 * errors[1]


def test_leaving_out_is_retraining_without(likely, make_rollouts, held_out):
    """Three steps with and without each prompt, by hand: one backward pass a prompt and plain ascent."""
    rollouts, steps, h = make_rollouts(likely, prompts=3), 3, 1e-3
    before = weights(likely)

    def mean_of(uids) -> Gradient:
        per_prompt = gradients_by_loop(likely, rollouts, OBJECTIVE)
        return {name: sum(per_prompt[uid][name] for uid in uids) / 3 for name in likely.trainable()}

    everyone = list(rollouts.groups())
    whole = mean_of(everyone)
    rate = (
        h
        * sum(float(w.square().sum()) for w in before.values()) ** 0.5
        / sum(float(g.square().sum()) for g in whole.values()) ** 0.5
    )

    def train(uids) -> dict[str, float]:
        for _ in range(steps):
            direction = mean_of(uids)
            with torch.no_grad():
                for name, p in likely.trainable().items():
                    p.add_(direction[name].to(p), alpha=rate)
        after = {name: level(likely, prompts) for name, prompts in held_out.items()}
        with torch.no_grad():
            for name, p in likely.model.named_parameters():
                p.copy_(before[name])
        return after

    start, full = {name: level(likely, prompts) for name, prompts in held_out.items()}, train(everyone)
    without = [train([u for u in everyone if u != uid]) for uid in everyone]
    effects, change = leave_one_out(likely, rollouts, held_out, objective=OBJECTIVE, steps=steps, size=h)
    for name in held_out:
        assert change[name] == pytest.approx(full[name] - start[name], rel=1e-3)
        assert effects[name] == pytest.approx([full[name] - w[name] for w in without], rel=1e-2)


def test_a_prompt_without_signal_does_nothing(llama, make_rollouts, held_out):
    """Rewards that agree give no gradient, so no step, no effect, and no contribution to a pool."""
    rollouts = make_rollouts(llama, prompts=3)
    flat = {i for i in range(len(rollouts)) if rollouts.prompt_uid[i] == "prompt-1"}
    columns = rollouts.columns()
    columns["reward"] = tuple(1.0 if i in flat else r for i, r in enumerate(rollouts.reward))
    rollouts = type(rollouts).of(columns)
    effects = step_effects(llama, rollouts, held_out, objective=OBJECTIVE)
    left, _ = leave_one_out(llama, rollouts, held_out, objective=OBJECTIVE, steps=1)
    for column in (*effects["unit"].values(), *effects["raw"].values(), *left.values()):
        assert column[1] == 0.0
    assert all(effects["unit"]["test"][[0, 2]] != 0)


def test_what_cannot_be_measured_is_refused(llama, make_rollouts, held_out):
    """Answers that are not unique, a dtype that would round the step away, and pools that nothing can be left out of."""
    rollouts = make_rollouts(llama)
    columns = held_out["test"].columns()
    other = {"test": Prompts.of({**columns, "verifier": (canonical({"id": "numeric"}),)})}
    with pytest.raises(ValueError, match="numeric"):
        step_effects(llama, rollouts, other, objective=OBJECTIVE)
    with pytest.raises(ValueError, match="1 prompt"):
        leave_one_out(llama, rollouts.take(rollouts.groups()["prompt-0"]), held_out, objective=OBJECTIVE)
    flat = type(rollouts).of({**rollouts.columns(), "reward": (1.0,) * len(rollouts)})
    with pytest.raises(ValueError, match="rewards differ"):
        leave_one_out(llama, flat, held_out, objective=OBJECTIVE)
    coarse = Policy(llama.model.bfloat16(), llama.tokenizer)
    for measure in (step_effects, leave_one_out):
        with pytest.raises(ValueError, match="bfloat16"):
            measure(coarse, rollouts, held_out, objective=OBJECTIVE)
