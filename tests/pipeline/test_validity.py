"""Scores held against effects: each scorer against the loop, what is left out, what noise there is."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from pipeline import counterfactual
from pipeline.directional import in_float32
from pipeline.features import projection_for, sketch_gradients
from pipeline.policy import Policy
from pipeline.records import Rollouts
from pipeline.scorers import SCORERS, Settings
from pipeline.validity import compare, dtype_noise, of_prompts, split_half, with_signal, work
from tests.oracles import gradients_by_loop

OBJECTIVE = "grpo_sequence"


@pytest.fixture
def setting(llama, make_rollouts, make_prompts):
    """Nine prompts in two draws, of which one has no signal in the first, rollouts to aim with, and two held-out sets."""
    own, other = (make_rollouts(llama, prompts=9, seed=seed) for seed in (0, 0))
    flat = own.columns() | {
        "reward": tuple(1.0 if uid == "prompt-2" else r for uid, r in zip(own.prompt_uid, own.reward, strict=True))
    }
    goals = make_rollouts(llama, prompts=3, seed=7)
    held_out = {
        "validation": make_prompts([("1+1=", "2"), ("R1", "3"), ("S", "")]),
        "test": make_prompts([("3+", "5")]),
    }
    sketch = partial(sketch_gradients, objective=OBJECTIVE, projection=projection_for(llama, 4096))
    settings = Settings(OBJECTIVE, sketch, (1.0, 1.0), 0.3, 3.0, 5, False, 65_536)
    return Rollouts.of(flat), other, goals, held_out, settings


def flat(gradient) -> torch.Tensor:
    return torch.cat([g.double().flatten() for g in gradient.values()])


def test_scores_are_those_of_the_loop(llama, setting):
    """Norm, dot product and cosine are those of gradients by one backward pass a prompt; the rest is what it says."""
    own, other, goals, held_out, settings = setting
    columns, _ = compare(llama, own, other, goals, held_out, settings)
    gradients = {uid: flat(g) for uid, g in gradients_by_loop(llama, own, OBJECTIVE).items()}
    target = sum(flat(g) for g in gradients_by_loop(llama, goals, OBJECTIVE).values()) / 3
    uids = columns["prompt_uid"]
    assert uids == [f"prompt-{i}" for i in range(9) if i != 2]
    assert columns["score_norm"] == pytest.approx([float(gradients[u].norm()) for u in uids], rel=1e-4)
    assert columns["score_dot"] == pytest.approx([float(gradients[u] @ target) for u in uids], rel=1e-3, abs=1e-3)
    spread = float(np.std(columns["score_dot"]))
    assert columns["score_directional"] == pytest.approx(columns["score_dot"], abs=0.05 * spread)
    by_hand = [float(gradients[u] @ target / gradients[u].norm()) for u in uids]
    assert columns["score_cropi"] == pytest.approx(by_hand, rel=1e-3, abs=1e-4)
    length = float(target.norm())
    assert columns["score_cropi_sketch"] == pytest.approx([c / length for c in by_hand], abs=4 / np.sqrt(4096))
    p = [np.mean([own.reward[i] for i in own.groups()[u]]) for u in uids]
    assert columns["score_variance"] == pytest.approx([x * (1 - x) for x in p])
    assert len(set(columns["score_uniform"])) == len(uids)
    assert {f"score_{name}" for name in SCORERS} <= set(columns)


def test_a_score_that_is_the_effect_agrees_and_a_permuted_one_does_not(llama, setting, monkeypatch):
    """A scorer that is told the effects has rho 1 with them, whatever the effect; told them in another order, it has not."""
    own, other, goals, held_out, settings = setting
    told, _ = compare(llama, own, other, goals, held_out, settings)
    effects = np.array(told["effect_unit_validation"])
    rng = np.random.default_rng(0)
    monkeypatch.setitem(SCORERS, "told", lambda known: effects)
    monkeypatch.setitem(SCORERS, "permuted", lambda known: effects[rng.permutation(len(effects))])
    _, result = compare(llama, own, other, goals, held_out, settings)
    found = result["agreement"]["unit"]["validation"]
    assert found["told"]["rho"] == pytest.approx(1)
    assert abs(found["permuted"]["rho"]) < 0.9
    for effect, sets in result["agreement"].items():
        for split, scores in sets.items():
            column = [v for v in told[f"effect_{effect}_{split}"] if v is not None]
            assert scores["told"]["rho"] == pytest.approx(spearmanr(effects[: len(column)], column).statistic)


def test_the_exact_gradient_orders_small_effects(llama, setting):
    """The direction that knows the answers orders what small raw steps do, all but perfectly."""
    own, other, goals, held_out, settings = setting
    columns, _ = compare(llama, own, other, goals, held_out, settings)
    first = np.array(columns["score_exact"]) * np.array(columns["score_norm"])
    size = {"raw": 1e-6}
    effects = counterfactual.step_effects(
        llama, with_signal(own), held_out, objective=OBJECTIVE, kinds=("raw",), size=size
    )
    assert spearmanr(first, effects["raw"]["validation"]).statistic > 0.95


def test_what_is_counted(llama, setting):
    """Prompts asked for, with signal, with signal in the other draw, in the pool; and every unit of work."""
    own, other, goals, held_out, settings = setting
    done = []
    columns, result = compare(llama, own, other, goals, held_out, settings, advance=done.append)
    assert result["prompts"] == {"asked": 9, "signal": 8, "signal_other": 8, "pool": 8}
    assert sum(done) == work(8) == 2 * 8 + 9
    assert result["dtype"] is None
    assert -1 <= result["target_cosine"] <= 1
    assert set(result["agreement"]) == {"unit", "raw", "other", "left_out"}
    one_draw = np.array(columns["effect_other_test"])
    assert one_draw == pytest.approx(np.array(columns["effect_unit_test"]))  # the other draw is the same one here


def test_reliability_is_of_halves(llama, make_rollouts):
    """Where odd and even rollouts are the same, the score is reliable; the halves are scored as groups of their own."""
    rollouts = make_rollouts(llama, prompts=8, samples=4)
    rows = [i for group in rollouts.groups().values() for i in group[:4] for _ in range(2)]
    doubled = rollouts.take(rows)
    target = counterfactual.policy_gradient(llama, make_rollouts(llama, seed=3), OBJECTIVE)
    options = {"objective": OBJECTIVE, "micro_tokens": 65_536}
    for found in split_half(llama, doubled, target, **options).values():
        assert found["halves"] == pytest.approx(1) and found["whole"] == pytest.approx(1)
    alone = [rollouts.take([i for g in rollouts.groups().values() for i in g[parity::2]]) for parity in (0, 1)]
    dots = [counterfactual.alignments(llama, half, {"v": target}, objective=OBJECTIVE)["v"] for half in alone]
    by_hand = spearmanr(*dots).statistic
    assert split_half(llama, rollouts, target, **options)["dot"]["halves"] == pytest.approx(by_hand)


def test_dtype_noise_is_seen(llama, make_rollouts):
    """In bfloat16 gradients point nearly, not quite, where those of the same weights in float32 point."""
    coarse = Policy(llama.model.bfloat16(), llama.tokenizer)
    precise = in_float32(coarse)
    assert precise is not coarse and in_float32(precise) is precise
    assert all(
        torch.equal(a.float(), b) for a, b in zip(coarse.model.parameters(), precise.model.parameters(), strict=True)
    )
    noise = dtype_noise(coarse, precise, make_rollouts(precise), objective=OBJECTIVE, micro_tokens=65_536)
    assert noise["dtype"] == "bfloat16" and noise["prompts"] == 3
    assert 0.8 < noise["least"] <= noise["mean"] < 0.999999


def test_a_coarse_policy_is_scored_as_it_is_and_stepped_in_float32(llama, setting):
    """A bfloat16 policy is compared too: its own scores, steps on a float32 copy, and its weights untouched."""
    own, other, goals, held_out, settings = setting
    coarse = Policy(llama.model.bfloat16(), llama.tokenizer)
    before = [p.detach().clone() for p in coarse.model.parameters()]
    columns, result = compare(coarse, own, other, goals, held_out, settings)
    assert result["dtype"]["dtype"] == "bfloat16"
    assert all(torch.equal(a, b) for a, b in zip(before, coarse.model.parameters(), strict=True))
    assert len(set(columns["effect_unit_validation"])) > 4


def test_too_little_is_refused(llama, setting, make_rollouts):
    """Prompts that all agree, goals that all agree, and prompts without rollouts are errors that say what to do."""
    own, other, goals, held_out, settings = setting
    agreed = Rollouts.of(own.columns() | {"reward": (0.0,) * len(own)})
    with pytest.raises(ValueError, match="--prompts"):
        compare(llama, agreed, other, goals, held_out, settings)
    with pytest.raises(ValueError, match="validation_rollouts"):
        compare(llama, own, other, Rollouts.of(goals.columns() | {"reward": (0.0,) * len(goals)}), held_out, settings)
    with pytest.raises(ValueError, match="prompt-4"):
        of_prompts(goals, ("prompt-0", "prompt-4"))
