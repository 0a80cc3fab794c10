"""Policies of a training run, and what stored and fresh rollouts say at each: the data of ``off_policy``.

Gradients are exact, without a projection. The score functions of the distinct completions are kept as inner products
with each other and with the validation gradients, of which every objective is a combination.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flows.config import load_config
from pipeline.embedded.pool import make_sets
from pipeline.embedded.warm_start import warm_start
from pipeline.generation import Sampling
from pipeline.generation.transformers import TransformersGenerate
from pipeline.gradients import prompt_gradients
from pipeline.objective import OBJECTIVES
from pipeline.optimization import Optimization, make_optimizer
from pipeline.packing import pack, packed_logps, passes
from pipeline.policy import Policy, load_policy, save_policy
from pipeline.records import Prompts, Rollouts, canonical, keyed_seed, prompt_uid
from pipeline.rollouts import collect
from pipeline.training import Batches, train
from pipeline.verifiers import verify

STEPS = (0, 10, 30, 60)
STORED, TRUTH, FRESH, VALIDATION = 32, 32, 16, 8
RECIPE = load_config("embedded")


@dataclass
class Evidence:
    """Rollouts of some prompts, as columns, with their distinct completions numbered prompt by prompt.

    ``reward``, ``owner``, ``step`` and ``unit`` have one value a rollout; ``new``, ``old`` and ``mask`` one a token.
    """

    reward: np.ndarray
    owner: np.ndarray
    step: np.ndarray
    unit: np.ndarray
    new: np.ndarray
    old: np.ndarray
    mask: np.ndarray

    def take(self, rows: np.ndarray) -> "Evidence":
        return Evidence(*(column[rows] for column in vars(self).values()))

    def first(self, k: int, skip: int = 0) -> "Evidence":
        """The rollouts ``skip`` .. ``skip + k`` of each prompt."""
        number = np.zeros(len(self.owner), int)
        for prompt in np.unique(self.owner):
            rows = np.flatnonzero(self.owner == prompt)
            number[rows] = np.arange(len(rows))
        return self.take(np.flatnonzero((number >= skip) & (number < skip + k)))

    def of(self, prompts: np.ndarray) -> "Evidence":
        return self.take(np.flatnonzero(np.isin(self.owner, prompts)))

    def __add__(self, other: "Evidence") -> "Evidence":
        return Evidence(
            *(np.concatenate([a, b]) for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass
class State:
    """One policy of one run: evidence of each kind, and inner products of score functions.

    ``dots[kind][unit, target]`` and ``grams[kind][prompt]`` belong to the sum over tokens of grad log pi
    (``sequence``) or of ratio times grad log pi (``token``, of stored rollouts only).
    """

    prompts: int
    stored: Evidence
    trained: Evidence
    fresh: Evidence
    dots: dict[str, np.ndarray]
    grams: dict[str, list[np.ndarray]]
    begins: np.ndarray  # the first unit of each prompt
    norms: np.ndarray  # of the targets: validation rollouts fresh, fresh for the truth alone, stored


def states(seed: int, count: int, folder: Path) -> Iterator[tuple[int, State]]:
    """Train, and stop at each of ``STEPS`` to look."""
    if not (folder / "warm").exists():
        save_policy(warm_start(0, progress=lambda done, total: None), folder / "warm")
    policy = load_policy(folder / "warm", attention="eager")
    sets = {name: _prompts(rows) for name, rows in make_sets(policy, seed).items()}
    pool = sets["pool"]
    prompts = pool.take(sorted(np.random.default_rng(seed).choice(len(pool), count, replace=False)))
    validation = Prompts.concat([sets["validation_add"], sets["validation_sub"]])
    settings = RECIPE.train
    optimization = Optimization(
        sum(settings.stages), settings.lr, settings.betas, settings.warmup, settings.final, settings.clip_norm, 16_384
    )
    optimizer = make_optimizer(policy, optimization)
    batches = Batches("shuffle", settings.batch, settings.rollouts, 1.0, 0.3, 3.0, 16, keyed_seed(seed, "batches"))
    flat = (np.ones(len(pool)), np.ones(len(pool)))
    stored = _roll(policy, prompts, STORED, keyed_seed(seed, "stored"))
    old = _roll(policy, validation, VALIDATION, keyed_seed(seed, "stored validation"))
    trained, done = stored.take([]), 0
    for step in STEPS:
        for made in train(
            policy, optimizer, pool, flat,
            lambda batch, at: _roll(policy, batch, settings.rollouts, keyed_seed(seed, "train", at), at + 1),
            first=done, steps=step - done, stage_start=0, optimization=optimization, batches=batches, reference=None,
        ):  # fmt: skip
            ours = [i for i, uid in enumerate(made.rollouts.prompt_uid) if uid in set(prompts.prompt_uid)]
            trained = Rollouts.concat([trained, made.rollouts.take(ours)])
        done = step
        targets = [
            _roll(policy, validation, VALIDATION, keyed_seed(seed, "validation", step)),
            _roll(policy, validation, 2 * VALIDATION, keyed_seed(seed, "validation of the truth", step)),
            old,
        ]
        fresh = _roll(policy, prompts, FRESH + TRUTH, keyed_seed(seed, "fresh", step), step)
        yield step, look(policy, prompts, {"stored": stored, "trained": trained, "fresh": fresh}, targets)


def look(policy: Policy, prompts: Prompts, evidence: dict[str, Rollouts], targets: list[Rollouts]) -> State:
    """Take the inner products of all that was sampled at, or stored for, this policy."""
    v = torch.stack([sum(rows.sum(0) for rows in _gradients(policy, r, "grpo_sequence")) for r in targets])  # type: ignore[arg-type]
    row = {uid: i for i, uid in enumerate(prompts.prompt_uid)}
    together = Rollouts.concat(evidence.values())  # stored ones first: a shared completion keeps their log-probability
    keys = [(row[uid], tuple(c)) for uid, c in zip(together.prompt_uid, together.completion_ids, strict=True)]
    seen: dict[tuple[int, tuple[int, ...]], int] = {}
    for i, key in enumerate(keys):
        seen.setdefault(key, i)
    order = sorted(seen, key=lambda key: key[0])
    unit = {key: n for n, key in enumerate(order)}
    distinct = together.take([seen[key] for key in order])
    owner = np.array([key[0] for key in order])
    new = _logps(policy, distinct)
    alone = Rollouts.of(distinct.columns() | {"prompt_uid": [f"{i:06d}" for i in range(len(distinct))]})
    of_stored = np.unique([unit[key] for key in keys[: len(evidence["stored"])]])
    dots = {kind: np.zeros((len(owner), len(targets))) for kind in ("sequence", "token")}
    grams: dict[str, list[np.ndarray]] = {kind: [] for kind in dots}
    for some in np.array_split(np.arange(len(prompts)), max(1, len(prompts) // 8)):
        for kind in dots:
            mine = np.flatnonzero(np.isin(owner, some))
            mine = mine if kind == "sequence" else mine[np.isin(mine, of_stored)]
            (rows,) = _gradients(policy, alone.take(mine), kind)
            dots[kind][mine] = (rows @ v.T).numpy()
            for prompt in some:
                own = np.flatnonzero(owner == prompt)
                gram = np.zeros((len(own), len(own)))
                part = rows[np.isin(mine, own)]
                here = np.flatnonzero(np.isin(own, mine))
                gram[np.ix_(here, here)] = (part @ part.T).numpy()
                grams[kind].append(gram)
    parts, at = {}, 0
    for name, rollouts in evidence.items():
        parts[name] = _columns(rollouts, [unit[key] for key in keys[at : at + len(rollouts)]], owner, new)
        at += len(rollouts)
    begins = np.searchsorted(owner, np.arange(len(prompts)))
    return State(len(prompts), **parts, dots=dots, grams=grams, begins=begins, norms=v.norm(dim=1).numpy())


def _columns(rollouts: Rollouts, unit: list[int], owner: np.ndarray, new: list[np.ndarray]) -> Evidence:
    width = RECIPE.sampling.max_new_tokens
    columns = np.zeros((3, len(rollouts), width))
    for i, (n, old) in enumerate(zip(unit, rollouts.logp_old, strict=True)):
        columns[0, i, : len(old)], columns[1, i, : len(old)], columns[2, i, : len(old)] = new[n], old, 1
    units = np.array(unit, int)
    reward, step = np.array(rollouts.reward, float), np.array(rollouts.step, int)
    return Evidence(reward, owner[units], step, units, columns[0], columns[1], columns[2] > 0)


def _gradients(policy: Policy, rollouts: Rollouts, objective: str) -> Iterator[Tensor]:
    """Yield the flat gradients of some prompts after another, (prompts, parameters)."""
    shapes, at, size = {name: p.shape for name, p in policy.trainable().items()}, {}, 0
    for name, shape in shapes.items():
        at[name], size = size, size + shape.numel()
    groups = rollouts.groups()
    for start in range(0, len(groups), 512):
        uids = list(groups)[start : start + 512]
        flat = torch.zeros(len(uids), size)

        def sink(name: str, prompts: slice, grads: Tensor, rows: Tensor | None = None, flat: Tensor = flat) -> None:
            part = flat[prompts, at[name] : at[name] + shapes[name].numel()]
            if rows is None:
                part += grads.flatten(1)
            else:
                part.view(len(part), *shapes[name])[0].index_add_(0, rows, grads[0])

        part = rollouts.take([i for uid in uids for i in groups[uid]])
        prompt_gradients(policy, part, objective, sink, micro_tokens=RECIPE.policy.micro_tokens)
        yield flat


def _logps(policy: Policy, rollouts: Rollouts) -> list[np.ndarray]:
    found: list[np.ndarray] = [np.empty(0)] * len(rollouts)
    with torch.no_grad():
        for rows in (rows for parts in passes(pack(rollouts), RECIPE.policy.micro_tokens) for rows in parts):
            logp = packed_logps(policy, rollouts, rows).double().numpy()
            for at, i in enumerate(i for row in rows for i in row.rollouts):
                found[i] = logp[at, : len(rollouts.completion_ids[i])]
    return found


def _prompts(rows: dict[str, list[str]]) -> Prompts:
    messages = [canonical([{"role": "user", "content": prompt}]) for prompt in rows["prompt"]]
    uids = [prompt_uid(m, t, "embedded") for m, t in zip(messages, rows["ground_truth"], strict=True)]
    exact, n = canonical({"id": "exact"}), len(uids)
    truths, abilities = tuple(rows["ground_truth"]), tuple(rows["ability"])
    return Prompts(tuple(uids), tuple(messages), truths, ("embedded",) * n, abilities, (exact,) * n)


def _roll(policy: Policy, prompts: Prompts, rollouts: int, seed: int, step: int = 0) -> Rollouts:
    groups = collect(
        prompts, TransformersGenerate(policy), _score, policy.tokenizer, rollouts=rollouts,
        sampling=Sampling(max_new_tokens=RECIPE.sampling.max_new_tokens), seed=seed, policy="", step=step,
    )  # fmt: skip
    return Rollouts.concat(groups)


def _score(items):
    return [verify(json.loads(spec), truth, text) for spec, truth, text in items]


def _sequence(new, old, mask, rewards, owner):
    return mask.astype(float)


def _token(new, old, mask, rewards, owner):
    return np.exp(np.where(mask, new - old, 0.0)) * mask


OBJECTIVES.update(sequence=_sequence, token=_token)
