"""Online training against a plain loop, with a scripted sampler."""

import copy

import numpy as np
import pytest
import torch

from pipeline.features import projection_for, sketch_gradients
from pipeline.optimization import Optimization, make_optimizer, optimizer_state
from pipeline.policy import collate, token_logps
from pipeline.records import Rollouts
from pipeline.reference import Reference
from pipeline.training import Batches, train

PAIRS = [(f"{i}+{i}=", str(2 * i)) for i in range(5)]
SETTINGS = Optimization(
    total_steps=10, lr=3e-4, betas=(0.9, 0.98), warmup=3, final=0.1, clip_norm=1.0, micro_tokens=1024
)
BATCHES = Batches(sampler="shuffle", batch=3, rollouts=4, discount=1.0, mu=0.3, eta=3.0, candidates=16, seed=0)


def scripted(policy, rewards=(1.0, 0.0, 0.0, 1.0)):
    """A sampler that says the same thing to each prompt at each step, with the policy's own log-probabilities."""

    def roll(prompts, step):
        rows = [(i, k) for i in range(len(prompts)) for k in range(4)]
        said, asked = [], []
        for i, k in rows:
            rng = np.random.default_rng([step, int(prompts.prompt_uid[i][:8], 16), k])
            said.append(tuple(rng.integers(2, 27, rng.integers(1, 5)).tolist()))
            asked.append(tuple(policy.tokenizer(PAIRS[int(prompts.ground_truth[i]) // 2][0]).input_ids))
        with torch.no_grad():
            logp = token_logps(policy.model, collate(asked, said, policy.pad_id)).numpy()
        n = len(rows)
        return Rollouts(
            prompt_uid=tuple(prompts.prompt_uid[i] for i, _ in rows),
            sample=tuple(k for _, k in rows),
            policy=("",) * n,
            step=(step,) * n,
            prompt_ids=tuple(asked),
            completion_ids=tuple(said),
            logp_old=tuple(logp[r, : len(tokens)] for r, tokens in enumerate(said)),
            temperature=(1.0,) * n,
            finish_reason=("stop",) * n,
            seed=(0,) * n,
            text=("",) * n,
            reward=tuple(rewards[k] for _, k in rows),
            verdict=tuple("correct" if rewards[k] else "incorrect" for _, k in rows),
        )

    return roll


@pytest.fixture
def prompts(make_prompts):
    """Five prompts with different answers."""
    return make_prompts(PAIRS)


def flat_belief(prompts):
    return np.ones(len(prompts)), np.ones(len(prompts))


def run(
    policy, prompts, *, steps, first=0, optimizer=None, roll=None, reference=None, settings=SETTINGS, batches=BATCHES
):
    optimizer = optimizer or make_optimizer(policy, settings)
    taken = train(
        policy,
        optimizer,
        prompts,
        flat_belief(prompts),
        roll or scripted(policy),
        first=first,
        steps=steps,
        stage_start=0,
        optimization=settings,
        batches=batches,
        reference=reference,
    )
    return list(taken), optimizer


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def plain_step(policy, optimizer, rollouts, lr):
    """Mean over prompts of the mean over rollouts of advantage times mean log-probability, by autograd."""
    groups = rollouts.groups()
    loss = torch.zeros(())
    for rows in groups.values():
        r = np.array([rollouts.reward[i] for i in rows])
        advantage = (r - r.mean()) / (r.std(ddof=1) + 1e-4)
        for i, a in zip(rows, advantage, strict=True):
            batch = collate([rollouts.prompt_ids[i]], [rollouts.completion_ids[i]], policy.pad_id)
            loss = loss - float(a) * token_logps(policy.model, batch).mean() / len(rows) / len(groups)
    optimizer.zero_grad()
    loss.backward()
    norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0))
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return norm


@pytest.mark.parametrize("micro_tokens", [1024, 20])
def test_two_steps_are_those_of_a_plain_loop(llama, prompts, micro_tokens):
    """After two steps, of up to 3e-4 together, every weight is that of an ordinary loop with one loss, to 1e-5.

    The typical weight agrees to 1e-8; the largest differences are where AdamW divides rounding by rounding.
    """
    before = weights(llama)
    plain = copy.deepcopy(llama)
    settings = Optimization(**{**SETTINGS.__dict__, "micro_tokens": micro_tokens})
    steps, _ = run(llama, prompts, steps=2, settings=settings)
    optimizer = torch.optim.AdamW(plain.model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    for step, lr in zip(steps, (1e-4, 2e-4), strict=True):
        plain_step(plain, optimizer, step.rollouts, lr)
    ours, theirs = weights(llama), weights(plain)
    apart = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    moved = torch.cat([(ours[name] - before[name]).abs().flatten() for name in ours])
    assert float(moved.max()) > 2e-4
    assert float(apart.max()) < 1e-5
    assert float(apart.median()) < 1e-8
    assert [step.metrics["lr"] for step in steps] == pytest.approx([1e-4, 2e-4])


def test_a_step_tells_what_it_did(llama, prompts):
    """A step reports its number, batch, signal, reward, norm and weights of one without a reference."""
    (step,), _ = run(llama, prompts, steps=1)
    assert set(step.weights) == set(step.rollouts.prompt_uid) < set(prompts.prompt_uid)
    assert set(step.weights.values()) == {1.0}
    told = step.metrics
    assert (told["step"], told["signal"], told["reward"]) == (1, 1.0, 0.5)
    assert told["gradient_norm"] > 0
    assert told["clipped"] == (told["gradient_norm"] > SETTINGS.clip_norm)
    assert not any(name.startswith("diem_") for name in told)


def test_a_batch_without_signal_makes_no_update(llama, prompts):
    """Where every group agrees, no weight and no moment changes, and the log says so."""
    before = weights(llama)
    (step,), optimizer = run(llama, prompts, steps=1, roll=scripted(llama, (1.0,) * 4))
    assert all(torch.equal(before[name], p) for name, p in weights(llama).items())
    assert not optimizer_state(llama, optimizer)
    assert (step.metrics["signal"], step.metrics["gradient_norm"], step.metrics["reward"]) == (0.0, 0.0, 1.0)
    assert set(step.weights.values()) == {1.0}


def test_a_prompt_without_signal_counts_in_the_mean(llama, prompts):
    """A group that agrees adds nothing, but the others are still divided by the whole batch."""
    full = scripted(llama)

    def roll(chosen, step):
        made = full(chosen, step)
        silent = chosen.prompt_uid[0]
        rewards = [0.0 if uid == silent else r for uid, r in zip(made.prompt_uid, made.reward, strict=True)]
        return Rollouts.of({**made.columns(), "reward": rewards})

    plain = copy.deepcopy(llama)
    (step,), _ = run(llama, prompts, steps=1, roll=roll)
    assert step.metrics["signal"] == pytest.approx(2 / 3)
    optimizer = torch.optim.AdamW(plain.model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    assert step.metrics["gradient_norm"] == pytest.approx(plain_step(plain, optimizer, step.rollouts, 1e-4), rel=1e-4)


def test_a_restored_optimizer_goes_on_as_if_never_stopped(llama, prompts):
    """Stopped after one step and restored from its state, the second step is bit for bit the same."""
    other = copy.deepcopy(llama)
    run(llama, prompts, steps=2)
    _, optimizer = run(other, prompts, steps=1)
    state = optimizer_state(other, optimizer)
    assert set(state) == {f"{n}/{part}" for n in other.trainable() for part in ("step", "exp_avg", "exp_avg_sq")}
    assert all(value.is_contiguous() for value in state.values())
    run(other, prompts, steps=1, first=1, optimizer=make_optimizer(other, SETTINGS, state))
    ours, theirs = weights(llama), weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def reference_of(policy, prompts, strength, ridge=0.0, own=True):
    """The batch's own first gradient as DIEM's reference, or a random direction."""
    rollouts = next(iter(run(copy.deepcopy(policy), prompts, steps=1)[0])).rollouts
    projection = projection_for(policy, 512)
    _, rows = sketch_gradients(policy, rollouts, "grpo_clipped", projection)
    direction = rows.sum(axis=0) if own else np.random.default_rng(0).standard_normal(512).astype(np.float32)
    return Reference("validation", "exact", projection, direction, ridge, strength)


def test_the_batch_as_its_own_reference_is_reported_as_a_no_op(llama, prompts):
    """Against the batch's own gradient the weights are one, the step is plain GRPO, and the log says identity."""
    plain = copy.deepcopy(llama)
    (step,), _ = run(llama, prompts, steps=1, reference=reference_of(llama, prompts, 1.0))
    assert list(step.weights.values()) == pytest.approx([1.0] * 3, abs=1e-6)
    assert step.metrics["diem_identity"] is True
    assert step.metrics["diem_cosine_to_plain"] == pytest.approx(1.0)
    run(plain, prompts, steps=1)
    ours, theirs = weights(llama), weights(plain)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


def test_a_foreign_reference_weights_the_step(llama, prompts):
    """Against another direction the weights differ from one, are tempered, and change the update."""
    plain = copy.deepcopy(llama)
    reference = reference_of(llama, prompts, 0.25, ridge=0.1, own=False)
    (step,), _ = run(llama, prompts, steps=1, reference=reference)
    assert step.metrics["diem_identity"] is False
    assert min(step.weights.values()) >= 0.75
    run(plain, prompts, steps=1)
    assert any(not torch.equal(a, b) for a, b in zip(weights(llama).values(), weights(plain).values(), strict=True))


def test_beliefs_live_through_the_steps(llama, prompts):
    """The sampler of information gain goes on to prompts that it has not seen: fresh beliefs are used at once."""
    batches = Batches(**{**BATCHES.__dict__, "sampler": "insight", "batch": 2})
    steps, _ = run(llama, prompts, steps=2, batches=batches)
    first, second = (set(step.rollouts.prompt_uid) for step in steps)
    assert len(first) == len(second) == 2
    assert not first & second


def test_a_gradient_that_is_not_finite_stops_the_run(llama, prompts):
    """NaN weights stop training with the name of a prompt."""
    roll = scripted(llama)
    with torch.no_grad():
        llama.model.model.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match="prompt"):
        run(llama, prompts, steps=1, roll=roll)


def test_the_step_size_by_hand():
    """Linear warm-up over three steps, then a straight line down that never falls below a tenth."""
    sizes = [SETTINGS.lr_at(step) / SETTINGS.lr for step in range(12)]
    decay = [0.1 + 0.9 * (10 - step) / 7 for step in range(3, 10)]
    assert sizes == pytest.approx([1 / 3, 2 / 3, 1.0, *decay, 0.1, 0.1])
