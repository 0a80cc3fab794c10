"""The two steps that need a policy in hand: a segment of training, and the measurement of a checkpoint."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flows import evidence as stored
from flows import selections
from flows.desk import Desk
from pipeline.records import Prompts, Rollouts

if TYPE_CHECKING:
    from pipeline.reference import Reference

OPTIMIZER = "optimizer.safetensors"
AVERAGE = "diem/average"  # beside the optimizer's moments: the moving average of the batches


def run_segment(
    desk: Desk,
    key: str,
    start: str,
    data: str,
    selection: str,
    evidence: Sequence[str],
    direction: np.ndarray | None,
    *,
    way: str,
    sampler: str,
    first: int,
    steps: int,
    stage_start: int,
    total: int,
) -> None:
    """Train from ``start`` for ``steps`` optimizer steps; commit checkpoint, optimizer state, rollouts and metrics."""
    from pipeline.optimization import Optimization, make_optimizer
    from pipeline.training import Batches
    from pipeline.training import train as steps_of

    config, settings = desk.config, desk.config.train
    prompts = desk.of_pool(data, selections.chosen(desk, selection))
    alpha, beta, _ = stored.beliefs(desk, evidence, prompts.prompt_uid)
    optimization = Optimization(
        total_steps=total,
        lr=settings.lr,
        betas=settings.betas,
        warmup=settings.warmup,
        final=settings.final,
        clip_norm=settings.clip_norm,
        micro_tokens=config.policy.micro_tokens,
        minibatch=settings.minibatch,
    )
    batches = Batches(
        sampler=sampler,
        batch=settings.batch,
        rollouts=settings.rollouts,
        discount=config.beliefs.discount,
        mu=config.insight.mu,
        eta=config.insight.eta,
        candidates=config.insight.candidates,
        seed=desk.seed("batches", stage_start),
    )
    began = time.perf_counter()
    state = None
    policy, optimizer = desk.take(start)
    if optimizer is None or config.diem.reference == "ema":
        state = optimizer_tensors(desk, start)
    optimizer = optimizer or make_optimizer(policy, optimization, state)
    reference = _reference(desk, policy, data, way, direction, state)
    desk.hold(key, policy, optimizer)  # under its new key: what it becomes as the steps are taken

    def roll(batch: Prompts, step: int) -> Rollouts:
        return stored.roll(
            desk, key, batch, rollouts=settings.rollouts, seed=desk.seed("rollouts", step), step=step + 1
        )

    made = []
    for step in steps_of(
        policy,
        optimizer,
        prompts,
        (alpha, beta),
        roll,
        first=first,
        steps=steps,
        stage_start=stage_start,
        optimization=optimization,
        batches=batches,
        reference=reference,
    ):
        made.append(step)
        desk.advance(1)
    average = reference.direction if reference and reference.source == "ema" else None
    judges = desk.store.meta(data)["verifiers"]
    _commit(desk, key, start, policy, optimizer, made, average, judges, time.perf_counter() - began)


def _reference(
    desk: Desk, policy: Any, data: str, way: str, direction: np.ndarray | None, state: dict[str, Any] | None
) -> Reference | None:
    """Return what the steps are aligned with; None for plain GRPO."""
    from flows.gradients import space
    from pipeline.evaluation import expected_reward_gradient
    from pipeline.features import project
    from pipeline.reference import Reference

    settings = desk.config.diem
    if not way:
        return None
    if settings.reference == "ema" and state and AVERAGE in state:
        direction = state[AVERAGE].numpy()
    where = space(desk, policy, way)
    if settings.reference == "expected_reward":
        sets = [desk.prompts(data, split) for split in desk.validation(data)]
        grads = [expected_reward_gradient(policy, of, chat=desk.config.policy.chat) for of in sets]
        direction = np.mean([project(where.projection, g) for g in grads], axis=0)
    return Reference(
        settings.reference, way, where.projection, direction, settings.ridge, settings.strength, block=where.block
    )


def measure(desk: Desk, key: str, prompts: Prompts) -> dict[str, float]:
    """Return greedy accuracy, and the exact expected reward where answers are unique."""
    from pipeline.evaluation import exact_reward, greedy_accuracy

    config, policy = desk.config, desk.load(key)
    if config.evaluate.limit:
        prompts = prompts.take(range(min(config.evaluate.limit, len(prompts))))
    with desk.engines.of(key) as generate:
        greedy = greedy_accuracy(
            policy,
            prompts,
            generate,
            desk.verifiers.score,
            max_new_tokens=config.evaluate.max_new_tokens or config.sampling.max_new_tokens,
            stop=config.sampling.stop,
            chat=config.policy.chat,
        )
    exact = (
        {"expected_reward": float(exact_reward(policy, prompts, chat=config.policy.chat).mean())}
        if config.evaluate.exact
        else {}
    )
    return {"greedy_accuracy": greedy, **exact}


def _commit(
    desk: Desk,
    key: str,
    start: str,
    policy: Any,
    optimizer: Any,
    made: list[Any],
    average: np.ndarray | None,
    verifiers: dict[str, str],
    seconds: float,
) -> None:
    import torch
    from safetensors.torch import save_file

    from pipeline.optimization import optimizer_state
    from pipeline.policy import save_policy

    rollouts = Rollouts.concat(step.rollouts for step in made)
    drawn = hashlib.sha256(np.concatenate([np.asarray(x, np.float32) for x in rollouts.logp_old]).tobytes()).hexdigest()
    batch = desk.store.key("rollouts", trained=key, drawn=drawn)  # by content: rounding elsewhere is another batch
    facts = {"policy": key, "split": "pool", "rollouts": len(rollouts), "verifiers": verifiers}
    desk.store.trajectories.write(batch, rollouts.columns(), facts)
    meta = {
        "start": start,
        "rollouts_key": batch,
        "rollouts": len(rollouts),
        "seconds": seconds,
        "metrics": [step.metrics for step in made],
        "weights": [step.weights for step in made],
    }
    if desk.config.policy.lora:
        meta["adapter_of"] = desk.store.meta(start).get("adapter_of") or start
    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, Path(folder))
        state = optimizer_state(policy, optimizer)
        if average is not None:
            state[AVERAGE] = torch.from_numpy(np.ascontiguousarray(average))
        save_file(state, Path(folder) / OPTIMIZER)
        desk.store.checkpoints.write(key, Path(folder), meta)


def optimizer_tensors(desk: Desk, key: str) -> dict[str, Any] | None:
    """Return the optimizer's state beside a checkpoint, by ``parameter/part``; None where there is none."""
    from safetensors.torch import load_file

    if OPTIMIZER not in desk.store.get(key).files:
        return None
    return load_file(desk.store.checkpoints.folder(key) / OPTIMIZER)
