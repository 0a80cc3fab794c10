"""Which prompts of a stage make the next batch.

``shuffle`` visits every prompt once an epoch, in an order keyed by identity. ``insight`` draws candidates uniformly
without replacement and keeps those with the highest weighted mutual information under the live beliefs
(arXiv:2603.01907, Algorithm 1); ties, which are common at the start, are broken at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from pipeline.records import keyed_seed
from pipeline.selectors import insight, uniform


def shuffle(uids: Sequence[str], step: int, *, batch: int, seed: int) -> list[int]:
    """Return the rows of batch ``step`` (from 0) of an endless walk through reshuffled epochs.

    Every epoch holds every prompt; its last batch is filled up from its own beginning, so no batch holds one twice.
    """
    batch = min(batch, len(uids))
    epoch, number = divmod(step, -(-len(uids) // batch))
    order = _order(tuple(uids), keyed_seed("epoch", seed, epoch))
    rows = order[number * batch : (number + 1) * batch]
    return [*rows, *order[: batch - len(rows)]]


@lru_cache(maxsize=2)
def _order(uids: tuple[str, ...], seed: int) -> tuple[int, ...]:
    return tuple(np.argsort(uniform.score(uids, seed=seed), kind="stable").tolist())


def best_of_candidates(
    uids: Sequence[str],
    alpha: Float[np.ndarray, " prompts"],
    beta: Float[np.ndarray, " prompts"],
    step: int,
    *,
    batch: int,
    rollouts: int,
    seed: int,
    mu: float,
    eta: float,
    candidates: int = 16,
) -> list[int]:
    """Return the rows of the ``batch`` best of ``candidates * batch`` random prompts, best first.

    ``candidates`` = 16 is the published ratio, for pools of thousands; on a stage of a hundred prompts it leaves no
    chance in the draw, and the same prompts are drilled at every step.
    """
    draw = uniform.score(uids, seed=keyed_seed("candidates", seed, step))
    drawn = np.argsort(draw, kind="stable")[: candidates * batch]
    value = insight.score(alpha[drawn], beta[drawn], rollouts=rollouts, mu=mu, eta=eta)
    return drawn[np.argsort(-value, kind="stable")[:batch]].tolist()
