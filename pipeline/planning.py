"""What a run will take before it starts: every step of every stage, from the settings and the sizes alone.

Counts are upper bounds where only the run can tell: every group is taken to have a signal, every prompt that was seen
to be a candidate. ``new_tokens`` is what a completion is expected to have; at ``max_new_tokens`` the tokens are a bound
too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.costs import (
    Cost,
    Rate,
    Shape,
    checkpoint_bytes,
    generation,
    gradients,
    static_bytes,
    update,
)


@dataclass(frozen=True)
class Sizes:
    """How much there is: prompts of the pool, of all validation sets and of those evaluated, and tokens of each."""

    pool: int
    validation: int
    evaluated: int
    prompt_tokens: float
    new_tokens: float
    longest_new: int


@dataclass(frozen=True)
class Loop:
    """The settings that decide how much is done; names as in the configuration."""

    stages: tuple[int, ...]
    batch: int
    rollouts: int
    save_every: int
    source: str
    collected: int
    validation_rollouts: int
    recent: int
    refresh: bool
    candidates: float
    dim: int
    directional: bool
    controls: bool
    exact: bool
    batch_tokens: int
    micro_tokens: int
    keeps_start: bool  # the first checkpoint is made, and kept in float32
    compare_full: bool = False
    engine: float = 0.0  # bytes that vLLM holds beside the policy; 0: Transformers samples with the policy itself
    sleeps: bool = False  # it gives them back while nothing is sampled


@dataclass(frozen=True)
class Line:
    """One step of one stage of one arm, and what it costs."""

    arm: str
    stage: int
    step: str
    cost: Cost


def plan(shape: Shape, rate: Rate, sizes: Sizes, loop: Loop) -> list[Line]:
    """Return every step of a run of one seed, in the order in which they are taken."""
    lines = [Line("curriculum", 0, "start_policy", Cost(disk=4.0 * shape.parameters))] if loop.keeps_start else []
    lines.append(Line("curriculum", 0, "evaluate", _evaluation(shape, rate, sizes, loop, 1)))
    stored = 0
    if loop.source == "collect":
        lines.append(Line("curriculum", 0, "collect", _sample(shape, rate, sizes, loop, sizes.pool, loop.collected)))
        stored = lines[-1].cost.rollouts
    elif loop.source != "first_stage":
        stored = sizes.pool * loop.collected  # what is brought in is not known before it is read
    seen = sizes.pool if stored else 0
    for number, steps in enumerate(loop.stages):
        if stored:
            for line in _selection(shape, rate, sizes, loop, number, stored, seen):
                lines.append(line)
                stored += line.cost.rollouts if line.step == "refresh" else 0
        lines += _training(shape, rate, sizes, loop, "curriculum", number, steps)
        stored += steps * min(loop.batch, sizes.pool) * loop.rollouts
        seen = min(sizes.pool, seen + steps * loop.batch)
    spent = sum(line.cost.rollouts for line in lines if line.step != "evaluate")
    if loop.controls:
        for number, steps in enumerate(loop.stages):
            lines += _training(shape, rate, sizes, loop, "control", number, steps)
        lines += _training(shape, rate, sizes, loop, "random", 0, math.ceil(spent / (loop.batch * loop.rollouts)))
    return lines


def total(lines: list[Line]) -> Cost:
    """Return what all lines cost together."""
    return sum((line.cost for line in lines), Cost())


def _selection(
    shape: Shape, rate: Rate, sizes: Sizes, loop: Loop, number: int, stored: int, seen: int
) -> Iterator[Line]:
    left = min(seen, max(1, int(loop.candidates * sizes.pool)))
    each = min(loop.recent, stored / max(1, seen))
    yield Line(
        "curriculum",
        number,
        "collect",
        _sample(shape, rate, sizes, loop, sizes.validation, loop.validation_rollouts),
    )
    if loop.refresh:
        yield Line("curriculum", number, "refresh", _sample(shape, rate, sizes, loop, left, loop.collected))
    if loop.directional:
        yield Line("curriculum", number, "score_directional", _gradients(shape, rate, sizes, loop, left, each))
        return
    disk = 2.0 * loop.dim * (left + sizes.validation)  # half precision
    cost = _gradients(shape, rate, sizes, loop, left, each)
    yield Line("curriculum", number, "featurize", replace(cost, disk=disk))
    if loop.compare_full and number == 0:  # at the untrained checkpoint alone
        cost = _gradients(_all_parameters(shape), rate, sizes, loop, left, each)
        yield Line("curriculum", number, "score_full", replace(cost, disk=disk))


def _gradients(shape: Shape, rate: Rate, sizes: Sizes, loop: Loop, left: int, each: float) -> Cost:
    """One gradient of each candidate and of each validation prompt."""
    pool, aims = (
        gradients(
            shape,
            rate,
            prompts=prompts,
            prompt_tokens=sizes.prompt_tokens,
            rollouts=rollouts,
            new_tokens=sizes.new_tokens,
            micro_tokens=loop.micro_tokens,
        )
        for prompts, rollouts in ((left, each), (sizes.validation, loop.validation_rollouts))
    )
    return _beside_engine(loop, pool + aims)


def _all_parameters(shape: Shape) -> Shape:
    """Return the shape of a policy without the adapter that trains: all that is left trains."""
    base = shape.parameters - shape.trainable
    return replace(shape, parameters=base, trainable=base, multiplied=shape.multiplied - shape.trainable)


def _beside_engine(loop: Loop, cost: Cost) -> Cost:
    return cost if loop.sleeps else replace(cost, memory=cost.memory + loop.engine)


def _training(shape: Shape, rate: Rate, sizes: Sizes, loop: Loop, arm: str, number: int, steps: int) -> Iterator[Line]:
    prompts = min(loop.batch, sizes.pool)
    step = update(
        shape,
        rate,
        prompts=prompts,
        prompt_tokens=sizes.prompt_tokens,
        rollouts=loop.rollouts,
        new_tokens=sizes.new_tokens,
        micro_tokens=loop.micro_tokens,
    )
    one = _sample(shape, rate, sizes, loop, prompts, loop.rollouts) + _beside_engine(loop, step)
    saved = math.ceil(steps / loop.save_every)
    whole = one.times(steps)
    yield Line(arm, number, "train", replace(whole, disk=whole.disk + saved * checkpoint_bytes(shape)))
    yield Line(arm, number, "evaluate", _evaluation(shape, rate, sizes, loop, saved))


def _sample(shape: Shape, rate: Rate, sizes: Sizes, loop: Loop, prompts: int, rollouts: int) -> Cost:
    cost = generation(
        shape,
        rate,
        prompts=prompts,
        prompt_tokens=sizes.prompt_tokens,
        rollouts=rollouts,
        new_tokens=sizes.new_tokens,
        batch_tokens=loop.batch_tokens,
    )
    return replace(cost, memory=static_bytes(shape) + loop.engine) if loop.engine else cost


def _evaluation(shape: Shape, rate: Rate, sizes: Sizes, loop: Loop, checkpoints: int) -> Cost:
    """One greedy completion a prompt, which is not stored, and a forward pass over the answer where that is exact."""
    greedy = _sample(shape, rate, sizes, loop, sizes.evaluated, 1)
    answers = round(sizes.evaluated * (sizes.prompt_tokens + sizes.new_tokens)) if loop.exact else 0
    return replace(greedy, disk=0.0, computed=greedy.computed + answers).times(checkpoints)
