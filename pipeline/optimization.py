"""AdamW over what trains: its step size over a run, and its moments as tensors that can be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.policy import Policy


@dataclass(frozen=True)
class Optimization:
    """How a run is optimized; the numbers that worked on the embedded default are those of its recipe.

    Attributes:
        total_steps: optimizer steps of the whole run, over which the step size decays.
        lr: peak step size.
        betas: AdamW's moments.
        warmup: steps of linear warm-up.
        final: share of ``lr`` that is left at the end.
        clip_norm: largest gradient norm.
        micro_tokens: most tokens in one backward pass.
        minibatch: prompts an update; 0 for the whole batch, so that a step is one update.
    """

    total_steps: int
    lr: float
    betas: tuple[float, float]
    warmup: int
    final: float
    clip_norm: float
    micro_tokens: int
    minibatch: int = 0

    def lr_at(self, step: int) -> float:
        """Return the step size of optimizer step ``step``, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        left = (self.total_steps - step) / max(1, self.total_steps - self.warmup)
        return self.lr * max(self.final, self.final + (1 - self.final) * left)


def make_optimizer(policy: Policy, optimization: Optimization, state: dict[str, Tensor] | None = None) -> Any:
    """Return AdamW over the trainable parameters, with the moments of ``state`` where they are given."""
    parameters = policy.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=optimization.lr, betas=optimization.betas, weight_decay=0.0)
    for name, parameter in parameters.items():
        if state:
            optimizer.state[parameter] = {
                part: state[f"{name}/{part}"].clone() for part in ("step", "exp_avg", "exp_avg_sq")
            }
    return optimizer


def optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return AdamW's moments by ``parameter/part``, as plain tensors that safetensors can hold."""
    return {
        f"{name}/{part}": value.detach().cpu().contiguous()
        for name, parameter in policy.trainable().items()
        for part, value in optimizer.state.get(parameter, {}).items()
    }
