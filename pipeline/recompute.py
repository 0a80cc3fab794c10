"""Gradient checkpointing that a pass for per-prompt gradients can see through.

A block keeps its input alone and is computed again when the backward pass comes to it (Chen et al., arXiv:1604.06174):
activations of one block at a time instead of all, for one more forward pass. A layer's input x then exists twice, in
the first forward pass and in the second; its output gradient b comes in between or after. So that x is not held from
the first pass on, ``pipeline.capture`` leaves x to the second pass and b to the backward pass, and whichever comes
later finds the other in the block's ``Visit``.

The library's own switch would not do: it is off in evaluation mode, which is the mode that policies are held in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

Meet = Callable[[Tensor, Tensor], None]
"""Takes a layer's input and the gradient of its output."""


class Visit:
    """One call of a block, made twice: which of the two runs, and what waits for its other half.

    Layers are told apart by their turn: a block calls them in the same order both times.
    """

    def __init__(self) -> None:
        self.again = False
        self._turn = 0
        self._inputs: dict[int, Tensor] = {}
        self._gradients: dict[int, tuple[Tensor, Meet]] = {}

    @contextmanager
    def running(self, *, again: bool) -> Iterator[None]:
        """Be the current visit meanwhile."""
        self.again, self._turn = again, 0
        _visits.append(self)
        try:
            yield
        finally:
            _visits.pop()

    def turn(self) -> int:
        """Return the number of the next layer of this run."""
        self._turn += 1
        return self._turn

    def give_input(self, turn: int, x: Tensor) -> None:
        """Take a layer's input, in the second run."""
        if turn in self._gradients:
            b, meet = self._gradients.pop(turn)
            with torch.no_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):  # what it computes is not the block's
                meet(x, b)
        else:
            self._inputs[turn] = x

    def give_gradient(self, turn: int, b: Tensor, meet: Meet) -> None:
        """Take a layer's output gradient, and what to do once its input is there."""
        if turn in self._inputs:
            meet(self._inputs.pop(turn), b)
        else:
            self._gradients[turn] = b, meet


_visits: list[Visit] = []  # not a thread's own: on a GPU the second run is in a thread of the backward pass


def current() -> Visit | None:
    """Return the visit that runs now; None outside of a block that is computed twice."""
    return _visits[-1] if _visits else None


def recompute_blocks(model: nn.Module) -> None:
    """Have each block of a model keep its input alone, and be computed again in the backward pass, from now on.

    Raises:
        ValueError: the model has no list of blocks.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(
            f"policy.checkpointing = true, but {type(model).__name__} has no list of blocks; set it to false"
        )
    for block in max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters())):
        block.forward = MethodType(_forward, block)  # a bound method, which a copy of the model copies rightly


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    def run(*args: Any) -> Any:
        return type(block).forward(block, *args, **kwargs)  # type: ignore[misc]

    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:  # a cache is filled once
        return run(*args)
    visit = Visit()
    with set_checkpoint_early_stop(False):  # it would end the second run before the last layer's input is seen
        return checkpoint(
            run, *args, use_reentrant=False, context_fn=lambda: (visit.running(again=False), visit.running(again=True))
        )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
