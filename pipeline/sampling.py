"""Which prompts of a stage make the next batch.

``shuffle`` visits every prompt once an epoch, in an order keyed by identity. ``insight`` draws candidates uniformly
without replacement and keeps those with the highest weighted mutual information under the live beliefs
(arXiv:2603.01907, Algorithm 1); ties, which are common at the start, are broken at random.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from pipeline.records import keyed_seed
from pipeline.selectors import insight, uniform

CANDIDATES = 16  # candidates a batch slot, the paper's main setting


def shuffle(uids: Sequence[str], step: int, *, batch: int, seed: int) -> list[int]:
    """Return the rows of batch ``step`` (from 0) of an endless walk through reshuffled epochs.

    Where an epoch ends inside a batch, the next one begins with prompts that the batch does not hold yet.
    """
    batch = min(batch, len(uids))
    epoch, offset = divmod(step * batch, len(uids))
    rows = _epoch(uids, epoch, batch, seed)[offset : offset + batch]
    missing = batch - len(rows)
    return rows + (_epoch(uids, epoch + 1, batch, seed)[:missing] if missing else [])


def _epoch(uids: Sequence[str], epoch: int, batch: int, seed: int) -> list[int]:
    order: list[int] = np.argsort(uniform.score(uids, seed=keyed_seed("epoch", seed, epoch)), kind="stable").tolist()
    missing = -epoch * len(uids) % batch  # places of the batch that the epoch before left unfinished
    if missing == 0:
        return order
    held = set(_epoch(uids, epoch - 1, batch, seed)[missing - batch :])
    first = [row for row in order if row not in held][:missing]
    return list(dict.fromkeys(first + order))


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
) -> list[int]:
    """Return the rows of the ``batch`` best of ``CANDIDATES * batch`` random candidates, best first."""
    draw = uniform.score(uids, seed=keyed_seed("candidates", seed, step))
    candidates = np.argsort(draw, kind="stable")[: CANDIDATES * batch]
    value = insight.score(alpha[candidates], beta[candidates], rollouts=rollouts, mu=mu, eta=eta)
    return candidates[np.argsort(-value, kind="stable")[:batch]].tolist()
