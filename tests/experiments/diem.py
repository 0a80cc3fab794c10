r"""Does weighting each step pay over a whole run? ``python -m tests.experiments.diem --report``

The embedded default, 80 steps of 16 prompts x 8 rollouts on a plain shuffle of the whole pool: plain GRPO, DIEM's weights,
and the same weights in random order. Arms of a seed share pool, order of the prompts and random streams, so differences are
paired. Two pools: ``noisy`` has 160 wrong labels among 800 prompts, ``clean`` is the same without them.

    level     exact P(correct) on 400 test prompts, mean of the last three evaluations, 4 steps apart
    seconds   of one thread's processor time: rollouts and updates, reference gradients included; evaluation is not
    rollouts  all that were sampled, for the reference too

References, on 96 validation prompts: ``exact`` is the gradient of their expected reward, grad mean P(correct), which
unique answers make a number without sampling; ``fresh`` is their policy gradient on 8 new rollouts each; ``stored`` keeps
the first of these rollouts and weights them by clipped sequence ratios (``grpo_sequence``).

Results are kept as JSON lines in ``runs/diem``, one an arm, pool and seed, so that a script that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from pipeline.embedded import pool as embedded
from pipeline.embedded.warm_start import warm_start
from pipeline.evaluation import EXACT, exact_reward, expected_reward_gradient, interval
from pipeline.features import project, projection_for, sketch_gradients
from pipeline.generation import Sampling
from pipeline.generation.transformers import TransformersGenerate
from pipeline.optimization import Optimization, make_optimizer
from pipeline.policy import Policy, load_policy, save_policy
from pipeline.projection import SparseProjection
from pipeline.records import Prompts, Rollouts, canonical, keyed_seed, prompt_uid
from pipeline.reference import Reference
from pipeline.reweight import diagnose, diem_weights, permuted, temper_to_floor
from pipeline.rollouts import collect
from pipeline.training import Batches, train
from pipeline.verifiers import verify

FOLDER = Path("runs/diem")
REPORTED = tuple(range(310, 326))
POOL = {"easy": 110, "easysub": 75, "add": 80, "sub": 80, "chain": 35, "rev": 120, "sort": 65, "mul": 75}
WRONG = {"nmod": 120, "noisy": 40}
STEPS, BATCH, ROLLOUTS, EVERY = 80, 16, 8, 4
SAMPLING = Sampling(max_new_tokens=6)


@dataclass(frozen=True)
class Arm:
    """How the steps of a run are weighted.

    Attributes:
        reference: ``none``, ``exact``, ``fresh`` or ``stored``.
        every: steps between two reference gradients.
        strength: a.
        ridge: relative ridge.
        ramp: steps over which a grows from zero.
        floor: least effective sample size, as a share of the prompts with a gradient.
        permuted: whether the weights are put in random order.
        way: how features are made, in ``pipeline.weighted``.
    """

    reference: str
    every: int = 20
    strength: float = 0.25
    ridge: float = 0.1
    ramp: int = 0
    floor: float = 0.0
    permuted: bool = False
    way: str = "exact"


PLAIN, DEFAULT = Arm("none"), Arm("exact")
ARMS = {
    "plain": PLAIN,
    "weights": DEFAULT,
    "permuted": replace(DEFAULT, permuted=True),
    "every 10": replace(DEFAULT, every=10),
    "every 40": replace(DEFAULT, every=40),
    "a = .5": replace(DEFAULT, strength=0.5),
    "ramp 16": replace(DEFAULT, ramp=16),
    "floor 2/3": replace(DEFAULT, strength=1.0, floor=2 / 3),
    "fresh": Arm("fresh"),
    "stored": Arm("stored"),
    "once": Arm("fresh", every=1000),
}
SHOWN = ("plain", "weights", "permuted")


class Aligned(Reference):
    """A reference whose strength may grow, and whose weights may be permuted."""

    def follow(self, arm: Arm, seed: int) -> None:
        """Weigh as an arm of a seed says."""
        self.arm, self.seed = arm, seed

    def weigh(self, features: np.ndarray, step: int, *, longest: float = np.inf) -> tuple[np.ndarray, Any]:
        """Return the weights of a minibatch, and what they did."""
        arm, rows = self.arm, features.astype(float)
        gram, active = rows @ rows.T, np.abs(rows).sum(axis=1) > 0
        raw = diem_weights(gram, rows @ self.direction, ridge=arm.ridge)
        raw = permuted(raw, active, self.seed, step) if arm.permuted else raw
        strength = arm.strength * (min(1.0, step / arm.ramp) if arm.ramp else 1.0)
        used, _ = temper_to_floor(raw, active, strength, arm.floor)
        return used, diagnose(gram, raw, used, ridge=arm.ridge, longest=longest)


class Validation:
    """Makes the reference gradient of an arm, and counts what it costs."""

    def __init__(self, policy: Policy, prompts: Prompts, arm: Arm, seed: int) -> None:
        self.policy, self.prompts, self.arm, self.seed, self.rollouts = policy, prompts, arm, seed, 0
        projection = projection_for(policy, 8192)
        assert isinstance(projection, SparseProjection)
        self.projection, self.stored = projection, None
        self.reference = Aligned("validation", arm.way, projection, np.zeros(8192), arm.ridge, arm.strength)
        self.reference.follow(arm, seed)

    def refresh(self, step: int) -> None:
        """Take the reference at the policy as it is now."""
        if self.arm.reference == "exact":
            self.reference.direction = project(self.projection, expected_reward_gradient(self.policy, self.prompts))
            return
        if self.stored is None or self.arm.reference == "fresh":
            self.stored = roll(self.policy, self.prompts, keyed_seed(self.seed, "validation", step), step)
            self.rollouts += len(self.stored)
        _, rows = sketch_gradients(self.policy, self.stored, "grpo_sequence", self.projection, micro_tokens=2048)
        self.reference.direction = rows.sum(axis=0) / len(self.prompts)


def run(name: str, which: str, seed: int) -> dict[str, Any]:
    """Train one arm on one pool of one seed."""
    arm, policy, sets = ARMS[name], start_policy(), make_sets(seed)
    pool, test = sets["pool"], sets["test"]
    if which == "clean":
        pool = pool.take([i for i, family in enumerate(pool.ability) if family not in WRONG])
    optimization = Optimization(
        STEPS, lr=1e-4, betas=(0.9, 0.98), warmup=8, final=0.1, clip_norm=1.0, micro_tokens=16_384
    )
    batches = Batches(
        "shuffle", BATCH, ROLLOUTS, discount=0.8, mu=0.3, eta=3.0, candidates=16, seed=keyed_seed(seed, "batches", 0)
    )
    validation = Validation(policy, Prompts.concat([sets["validation_add"], sets["validation_sub"]]), arm, seed)
    optimizer, flat = make_optimizer(policy, optimization), np.ones(len(pool))
    seconds = {"steps": 0.0, "reference": 0.0}
    curve, metrics, sampled = [level(policy, test)], [], 0
    for step in range(STEPS):
        began = time.process_time()
        if arm != PLAIN and step % arm.every == 0:
            validation.refresh(step)
        ready = time.process_time()
        (done,) = train(
            policy,
            optimizer,
            pool,
            (flat, flat),
            lambda batch, at: roll(policy, batch, keyed_seed(seed, "rollouts", at), at + 1),
            first=step,
            steps=1,
            stage_start=0,
            optimization=optimization,
            batches=batches,
            reference=None if arm == PLAIN else validation.reference,
        )
        seconds["steps"] += time.process_time() - ready
        seconds["reference"] += ready - began
        metrics.append(done.metrics)
        sampled += len(done.rollouts)
        if (step + 1) % EVERY == 0:
            curve.append(level(policy, test))
    names = ("clipped", "diem_effective_samples", "diem_cosine_to_plain", "diem_norm_acts")
    means = {n: float(np.mean([m[n] for m in metrics if n in m])) for n in names if any(n in m for m in metrics)}
    facts = {"arm": name, "pool": which, "seed": seed, "settings": asdict(arm)}
    told = {"last": float(np.mean(curve[-3:])), "mean": float(np.mean(curve)), "curve": curve}
    return facts | told | {"seconds": seconds, "rollouts": sampled, "rollouts_reference": validation.rollouts} | means


def start_policy() -> Policy:
    """Return the warm policy, made once."""
    if not (FOLDER / "warm" / "config.json").is_file():
        (FOLDER / "warm").mkdir(parents=True, exist_ok=True)
        save_policy(warm_start(0, progress=lambda done, total: None), FOLDER / "warm")
    return load_policy(FOLDER / "warm", attention="eager")


def make_sets(seed: int) -> dict[str, Prompts]:
    """Return the sets of a seed, made once."""
    file = FOLDER / f"sets_{seed}.json"
    if not file.is_file():
        with mock.patch.dict(embedded.POOL, POOL), mock.patch.dict(embedded.WRONG, WRONG):
            file.write_text(json.dumps(embedded.make_sets(start_policy(), seed)))
    return {name: _prompts(rows) for name, rows in json.loads(file.read_text()).items()}


def roll(policy: Policy, prompts: Prompts, seed: int, step: int) -> Rollouts:
    """Sample and score 8 rollouts a prompt, in this process."""
    made = collect(
        prompts,
        TransformersGenerate(policy),
        lambda items: [verify(json.loads(spec), truth, text) for spec, truth, text in items],
        policy.tokenizer,
        rollouts=ROLLOUTS,
        sampling=SAMPLING,
        seed=seed,
        policy="",
        step=step,
    )
    return Rollouts.concat(made)


def level(policy: Policy, test: Prompts) -> float:
    """Return exact P(correct)."""
    return float(exact_reward(policy, test).mean())


def compare(results: Sequence[dict[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row an arm and pool: its level, its paired difference to plain, and what it cost."""
    rows = []
    for which in ("noisy", "clean"):
        found = {(r["arm"], r["seed"]): r for r in results if r["pool"] == which}
        for arm in arms:
            seeds = [s for a, s in found if a == arm and ("plain", s) in found]
            if not seeds:
                continue
            ours, plain = [found[arm, s] for s in seeds], [found["plain", s] for s in seeds]
            cost = [sum(r["seconds"].values()) / sum(p["seconds"].values()) for r, p in zip(ours, plain, strict=True)]
            off = {key: [r[key] - p[key] for r, p in zip(ours, plain, strict=True)] for key in ("last", "mean")}
            row = {"pool": which, "arm": arm, "seeds": seeds, "level": interval([r["last"] for r in ours])}
            row |= {f"{key} - plain": interval(values) for key, values in off.items()}
            row |= {"ahead": sum(d > 0 for d in off["last"]), "by seed": off["last"], "seconds / plain": interval(cost)}
            row |= {
                key: float(np.mean([r[key] for r in ours])) for key in ("rollouts", "rollouts_reference", "clipped")
            }
            rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Return the comparison as a table, ± half of a 95 % interval."""
    lines = [
        "| pool | arm | level | last - plain | ahead | mean - plain | seconds / plain | rollouts a step, reference |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for r in rows:
        cells = [r["pool"], r["arm"], f"{r['level']['mean']:.3f} ± {r['level']['half_width'] or np.nan:.3f}"]
        for key in ("last - plain", "mean - plain", "seconds / plain"):
            cells.append(f"{r[key]['mean']:+.4f} ± {r[key]['half_width'] or np.nan:.4f}")
        cells.insert(4, f"{r['ahead']} of {len(r['seeds'])}")
        lines.append("| " + " | ".join([*cells, f"{r['rollouts'] / STEPS:.0f}, {r['rollouts_reference']:.0f}"]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not there yet, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="the reported arms and seeds")
    parser.add_argument("--arms", nargs="+", default=list(SHOWN), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[200, 201, 202, 203])
    parser.add_argument("--pools", nargs="+", default=["noisy", "clean"], choices=["noisy", "clean"])
    args = parser.parse_args()
    arms, seeds = (SHOWN, REPORTED) if args.report else (args.arms, args.seeds)
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    lines = FOLDER / ("report.jsonl" if args.report else "results.jsonl")
    results = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
    there = {(r["arm"], r["pool"], r["seed"]) for r in results}
    for seed, which, name in ((s, w, a) for s in seeds for w in args.pools for a in arms):
        if (name, which, seed) not in there:
            results.append(run(name, which, seed))
            with lines.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            print(f"{seed} {which} {name}: {results[-1]['last']:.4f}", flush=True)
    rows = compare([r for r in results if r["seed"] in seeds], arms)
    lines.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    lines.with_suffix(".md").write_text(show(rows) + "\n")
    print(show(rows))


def _prompts(rows: dict[str, list[str]]) -> Prompts:
    messages = [canonical([{"role": "user", "content": prompt}]) for prompt in rows["prompt"]]
    uids = [prompt_uid(m, t, "embedded") for m, t in zip(messages, rows["ground_truth"], strict=True)]
    same = [("embedded",) * len(uids), (EXACT,) * len(uids)]
    return Prompts(tuple(uids), tuple(messages), tuple(rows["ground_truth"]), same[0], tuple(rows["ability"]), same[1])


if __name__ == "__main__":
    main()
