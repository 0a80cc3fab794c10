r"""What a step is aligned with: the reference gradient of DIEM, in the space of a projection.

minibatch         sum of the minibatch's own features: weights of one, up to the ridge (arXiv:2608.29252, literal)
rollout_batch     sum over the whole rollout batch, of which the minibatch is a part
ema               m <- d m + (1 - d) sum of the minibatch, of the batches before this one
validation        mean gradient of the validation sets, made elsewhere from rollouts
expected_reward   gradient of their expected reward, made elsewhere where answers are unique
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from pipeline.features import Projection
from pipeline.reweight import Diagnostics, diagnose, diem_weights, temper
from pipeline.scope import Scope

SOURCES = ("minibatch", "rollout_batch", "ema", "validation", "expected_reward")


@dataclass
class Reference:
    """A reference gradient, and how far it is followed.

    Attributes:
        source: one of ``SOURCES``.
        way: how features are made; see ``pipeline.weighted``.
        projection: the projection of batch and reference.
        direction: the reference; None while there is none, and for ``minibatch``. Moves with ``ema``.
        ridge: damping of the Gram matrix, relative to its mean diagonal.
        strength: share of the weights that is mixed with one.
        decay: d of ``ema``.
        block: last block and its scope, from ``pipeline.scope.last_block``, for the way ``scope``.
    """

    source: str
    way: str
    projection: Projection
    direction: Float[np.ndarray, " dim"] | None
    ridge: float
    strength: float
    decay: float = 0.9
    block: tuple[nn.Module, Scope] | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source = {self.source!r}: choose one of {', '.join(SOURCES)}")
        if self.source in ("validation", "expected_reward") and self.direction is None:
            raise ValueError(f"source = {self.source!r} needs direction: the validation sets' gradient, projected")
        if (self.way == "scope") != (self.block is not None):
            raise ValueError(f"way = {self.way!r}: the last block is needed for the way 'scope', and only then")

    @property
    def options(self) -> dict[str, Any]:
        """What the way takes besides the batch."""
        return {"projection": self.projection} | ({"block": self.block} if self.block else {})

    def weigh(
        self, features: Float[np.ndarray, "prompts dim"], step: int, *, longest: float = np.inf
    ) -> tuple[Float[np.ndarray, " prompts"], Diagnostics]:
        """Return the weights of a minibatch at an optimizer step, and what they did.

        ``longest`` is the length of the summed gradient beyond which the step clips it.
        """
        rows = features.astype(float)
        gram, total = rows @ rows.T, rows.sum(axis=0)
        direction = total if self.source == "minibatch" else self.direction
        if direction is None:  # the first batch of a moving average: nothing to align with yet
            raw = np.ones(len(rows))
        else:
            raw = diem_weights(gram, rows @ direction.astype(float), ridge=self.ridge)
        if self.source == "ema":
            self.direction = total if self.direction is None else self.decay * self.direction + (1 - self.decay) * total
        used = temper(raw, self.strength)
        return used, diagnose(gram, raw, used, ridge=self.ridge, longest=longest)
