"""Which prompts have a signal, from rewards that come in parts: a running least, greatest and sum a prompt."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int


class Signals:
    """What the stored rollouts of each prompt of a pool come to.

    Args:
        prompts: size of the pool.

    Attributes:
        tokens: completion tokens of each prompt.
    """

    def __init__(self, prompts: int) -> None:
        self._least, self._greatest = np.full(prompts, np.inf, np.float32), np.full(prompts, -np.inf, np.float32)
        self.tokens = np.zeros(prompts, np.int64)

    def add(
        self,
        prompt: Int[np.ndarray, " rollouts"],
        reward: Float[np.ndarray, " rollouts"],
        tokens: Int[np.ndarray, " rollouts"],
    ) -> None:
        """Take some more rollouts: the place of each one's prompt in the pool, its reward and its completion tokens."""
        np.minimum.at(self._least, prompt, reward)
        np.maximum.at(self._greatest, prompt, reward)
        np.add.at(self.tokens, prompt, tokens)

    @property
    def seen(self) -> Bool[np.ndarray, " prompts"]:
        """Whether a prompt has rollouts."""
        return self._least <= self._greatest

    @property
    def signal(self) -> Bool[np.ndarray, " prompts"]:
        """Whether its rewards differ, as ``pipeline.advantages.has_signal`` says of a whole group."""
        return self._least < self._greatest
