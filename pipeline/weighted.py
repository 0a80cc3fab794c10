r"""The weighted gradient of a batch, three ways: sum_p W_p g_p, with W a function of the prompts' features z_p.

    exact         keep every g_p; z_p = R g_p                                       memory: prompts x parameters
    bookkeeping   keep layer inputs a and output gradients b; z_p from the factors;
                  G = sum_rows W_p b a^T, formed once                               memory: activations
    scope         z_p from the last block and the head alone; the rest of the backward pass goes on from that block's
                  input gradient, whose rows are scaled by W_p                      memory: that of the last block

The backward pass is linear and its rows are independent, so a row scaled at any layer is scaled in all layers below:
each way costs one forward and one backward pass, and its weighted gradient is exact. What differs is what W has seen.
Scaling a prompt's advantages by W_p gives the same gradient in a trainer that only offers that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.capture import Layer, capture, is_norm, layer_vjp
from pipeline.features import Projection, sketch_gradients, sketcher
from pipeline.gradients import backward, coefficients, logps_of, prompt_gradients
from pipeline.packing import pack, packed_logps, passes
from pipeline.policy import Policy
from pipeline.projection import SparseProjection
from pipeline.records import Rollouts
from pipeline.scope import Scope, everything, last_block

Weigh = Callable[[Float[np.ndarray, "prompts dim"]], Float[np.ndarray, " prompts"]]
"""Takes the features of a batch and returns its weights."""


def plain(
    policy: Policy,
    rollouts: Rollouts,
    objective: str,
    *,
    micro_tokens: int,
    weights: Float[np.ndarray, " prompts"] | None = None,
) -> None:
    """Add sum_p W_p g_p to each trainable parameter's ``grad`` by ordinary backward passes; W is one by default."""
    uids = list(rollouts.groups())
    for parts in passes(pack(rollouts), micro_tokens):
        members = [i for rows in parts for row in rows for i in row.rollouts]
        owner = np.array([row.prompt for rows in parts for row in rows for _ in row.rollouts])
        known = logps_of(policy, rollouts, parts) if len(parts) > 1 else None
        start = 0
        for rows in parts:
            logp = packed_logps(policy, rollouts, rows)
            seen = logp.detach().cpu().numpy() if known is None else known
            c = coefficients(objective, seen, rollouts.take(members), owner, uids)
            c = c * (1.0 if weights is None else weights[owner][:, None])
            part = c[start : start + len(logp), : logp.shape[1]]
            (logp * torch.from_numpy(part).to(logp)).sum().backward()
            start += len(logp)


def exact(
    policy: Policy, rollouts: Rollouts, objective: str, projection: Projection, weigh: Weigh, *, micro_tokens: int
) -> None:
    """Add sum_p W_p g_p to ``grad``, from every prompt's whole gradient; see ``plain`` for the arguments.

    Raises:
        ValueError: the projection is factored: it needs layers, not gradients.
    """
    if not isinstance(projection, SparseProjection):
        raise ValueError("the exact way keeps gradients, which a factored projection cannot read; use a sparse one")
    count = len(rollouts.groups())
    kept: dict[str, Tensor] = {}
    table = projection.zeros(count, policy.device)

    def keep(name: str, prompts: slice, grads: Tensor, rows: Tensor | None = None) -> None:
        if name not in kept and grads.shape[0] == count:
            kept[name] = grads
            return
        if name not in kept:
            kept[name] = torch.zeros(count, *policy.model.get_parameter(name).shape, device=grads.device)
        if rows is None:
            kept[name][prompts] += grads
        else:
            kept[name][prompts.start].index_add_(0, rows, grads[0])

    prompt_gradients(policy, rollouts, objective, keep, micro_tokens=micro_tokens)
    for name in projection.layout:
        projection.add(table, name, kept[name].flatten(1))
    weights = torch.from_numpy(weigh(projection.finish(table).cpu().numpy())).float().to(policy.device)
    for name, parameter in policy.trainable().items():
        _add_grad(parameter, (weights @ kept[name].flatten(1)).view_as(parameter))


def bookkeeping(
    policy: Policy, rollouts: Rollouts, objective: str, projection: Projection, weigh: Weigh, *, micro_tokens: int
) -> None:
    """Add sum_p W_p g_p to ``grad``, from layer inputs and output gradients that are kept for the whole batch."""
    uids = list(rollouts.groups())
    kept: list[tuple[Layer, list[int], int]] = []
    table = projection.zeros(len(uids), policy.device)
    sketch = sketcher(projection, table)

    def handler(layer: Layer, sizes: list[int], first: int) -> None:
        kept.append((layer, sizes, first))
        sketch(layer, sizes, first)

    for parts in passes(pack(rollouts), micro_tokens):
        backward(policy, rollouts, objective, handler, parts, uids)
    weights = weigh(projection.finish(table).cpu().numpy())
    for layer, sizes, first in kept:
        _add_weighted(policy, layer, sizes, weights[first : first + len(sizes)])


def scope(
    policy: Policy,
    rollouts: Rollouts,
    objective: str,
    projection: Projection,
    weigh: Weigh,
    *,
    micro_tokens: int,
    block: tuple[nn.Module, Scope] | None = None,
) -> None:
    """Add sum_p W_p g_p to ``grad``, with features of the last block and the head alone; ``block`` saves finding them.

    A batch that fits one pass is cut in two at the last block. A larger one makes a pass for the features first, which
    ends at that block, as a trainer's pass for log-probabilities would.
    """
    last, layers = block or last_block(policy.model)
    parts = list(passes(pack(rollouts), micro_tokens))
    if len(parts) > 1 or len(parts[0]) > 1:
        _, rows = sketch_gradients(policy, rollouts, objective, projection, micro_tokens=micro_tokens, scope=layers)
        plain(policy, rollouts, objective, micro_tokens=micro_tokens, weights=weigh(rows))
        return
    uids, rows_ = list(rollouts.groups()), parts[0][0]
    sizes = np.bincount([row.prompt for row in rows_]).tolist()
    kept: list[Layer] = []
    table = projection.zeros(len(uids), policy.device)
    sketch = sketcher(projection, table)

    def handler(layer: Layer) -> None:
        kept.append(layer)
        sketch(layer, sizes, 0)

    cut = _Cut()
    hook = last.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        with capture(policy.model, len(rows_), handler, scope=layers, entered=last):
            logp = packed_logps(policy, rollouts, rows_)
            members = [i for row in rows_ for i in row.rollouts]
            owner = np.array([row.prompt for row in rows_ for _ in row.rollouts])
            c = coefficients(objective, logp.detach().cpu().numpy(), rollouts.take(members), owner, uids)
            (logp * torch.from_numpy(c).to(logp)).sum().backward()
    finally:
        hook.remove()
    weights = weigh(projection.finish(table).cpu().numpy())
    for layer in kept:
        _add_weighted(policy, layer, sizes, weights)
    cut.go_on(_of_rows(weights, sizes, policy.device))


WAYS: dict[str, Callable[..., None]] = {"exact": exact, "bookkeeping": bookkeeping, "scope": scope}
KEPT = 1 << 28  # bytes of whole gradients, or of layer inputs and output gradients, that a way may keep: 256 MiB


def choose(policy: Policy, prompts: int, tokens: int) -> tuple[str, str]:
    """Return the most exact way that a batch of this size allows, and why.

    Args:
        policy: the policy.
        prompts: prompts a batch.
        tokens: tokens a batch, prompts included.
    """
    whole = 4 * prompts * sum(p.numel() for p in policy.trainable().values())
    if whole <= KEPT:
        return "exact", f"the gradients of {prompts} prompts take {whole / 2**20:.0f} MiB"
    widths = sum(sum(m.weight.shape) for m in everything(policy.model) if isinstance(m, nn.Linear))
    factors = tokens * widths * policy.model.dtype.itemsize
    if factors <= 8 * KEPT:
        return "bookkeeping", f"gradients would take {whole / 2**20:.0f} MiB; their factors take {factors / 2**20:.0f}"
    return "scope", f"gradients would take {whole / 2**20:.0f} MiB and their factors {factors / 2**20:.0f}"


class _Cut:
    """Cuts the graph at a module's first input, and goes on below it with scaled rows."""

    above: Tensor
    below: Tensor

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            raise ValueError(f"{type(module).__name__} takes no positional input to cut the graph at; use another way")
        self.below = args[0]
        self.above = args[0].detach().requires_grad_()
        return (self.above, *args[1:]), kwargs

    def go_on(self, weights: Tensor) -> None:
        grad = self.above.grad
        if self.below.requires_grad and grad is not None:
            self.below.backward(grad * weights.view(-1, *[1] * (grad.dim() - 1)).to(grad.dtype))


def _add_weighted(policy: Policy, layer: Layer, sizes: Sequence[int], weights: np.ndarray) -> None:
    """Add a layer's sum over rows of W b a^T, in one product, to its parameters' ``grad``."""
    module, names, x = layer.module, layer.names, layer.x
    w = _of_rows(weights, sizes, x.device)
    if is_norm(module):
        key = next(iter(names))
        _add_grad(getattr(module, key), w @ layer.scale_gradients)
        return
    if isinstance(module, nn.Linear):
        if "weight" in names:
            b, narrow = layer.b, x.shape[-1] < layer.b.shape[-1]
            x, b = (_scaled(x, w), b.float()) if narrow else (x.float(), _scaled(b, w))
            _add_grad(module.weight, b.reshape(-1, b.shape[-1]).T @ x.reshape(-1, x.shape[-1]))
        if "bias" in names:
            _add_grad(module.bias, _scaled(layer.b, w).flatten(0, -2).sum(0))
    elif isinstance(module, nn.Embedding):
        looked_up = torch.zeros_like(module.weight, dtype=torch.float32)
        _add_grad(module.weight, looked_up.index_add_(0, x.flatten(), _scaled(layer.b, w).flatten(0, -2)))
    else:
        for name, grads in layer_vjp(Layer(module, names, x, _scaled(layer.b, w)), sizes).items():
            _add_grad(policy.model.get_parameter(name), grads.sum(0))


def _scaled(rows: Tensor, weights: Tensor) -> Tensor:
    return rows.float() * weights.view(-1, *[1] * (rows.dim() - 1))


def _of_rows(weights: np.ndarray, sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.repeat(weights, sizes)).float().to(device)


def _add_grad(parameter: Any, grad: Tensor) -> None:
    grad = grad.to(parameter.dtype)
    parameter.grad = grad if parameter.grad is None else parameter.grad + grad
