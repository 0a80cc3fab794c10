r"""What each layer of one backward pass holds of every prompt's gradient.

Rows are independent in a transformer, so the backward pass of a sum over prompts already holds, at each layer, every
row's input a and output gradient b; the gradient of a prompt is the product of its own rows:

    linear        G_p = sum_{rows of p, t} b a^T            (out, in)
    embedding     G_p[v] = sum_{rows of p, t : x_t = v} b   (only the rows v that occur)
    RMS norm      G_p = sum_{rows of p, t} b * xhat
    any other     vector-Jacobian product of the layer alone, prompt by prompt

The weights themselves are frozen meanwhile, so that autograd does not form the batch gradient a second time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.recompute import current
from pipeline.scope import Scope, everything, parameters_of

WHOLE = 1 << 22  # entries up to which the gradients of several prompts are formed in one product: 16 MiB


@dataclass(frozen=True)
class Layer:
    """One layer's share of a backward pass.

    Attributes:
        module: the layer.
        names: its trainable parameters, attribute to parameter name.
        x: its input, first axis rows.
        b: gradient of its output, first axis rows.
    """

    module: nn.Module
    names: dict[str, str]
    x: Tensor
    b: Tensor

    @cached_property
    def scale_gradients(self) -> Tensor:
        """Each row's gradient of an RMS norm's scale, (rows, dim).

        The output is linear in the scale, so xhat is what the layer gives at scale one less what it gives at zero,
        whether the layer multiplies by its parameter or by one plus its parameter.
        """
        key, x = next(iter(self.names)), self.x.float()
        frozen = getattr(self.module, key)
        try:
            with torch.no_grad():
                at = []
                for scale in (1.0, 0.0):
                    self.module._parameters[key] = torch.full_like(frozen, scale, dtype=torch.float32)  # type: ignore[assignment]
                    at.append(self.module.forward(x))
        finally:
            self.module._parameters[key] = frozen
        return (self.b.float() * (at[0] - at[1])).flatten(1, -2).sum(1)


@runtime_checkable
class Sink(Protocol):
    """Takes gradients of one parameter as soon as they exist; may be called several times a parameter, to be added.

    ``grads`` is (prompts, *shape) for the prompts of the slice, in float32. With ``rows``, the slice is one prompt and
    ``grads`` is (1, len(rows), ...): those indices of the parameter's first axis, the others being zero.
    """

    def __call__(self, name: str, prompts: slice, grads: Tensor, rows: Tensor | None = None) -> None:
        """Take the gradients."""


@contextmanager
def capture(
    model: nn.Module,
    rows: int,
    handler: Callable[[Layer], None],
    *,
    scope: Scope | None = None,
    entered: nn.Module | None = None,
) -> Iterator[None]:
    """Hand the layers' inputs and output gradients to ``handler`` during a forward and backward pass.

    Args:
        model: rows of its inputs are independent of each other.
        rows: how many there are.
        handler: called for each use of a layer, from the last to the first.
        scope: the layers, all that train by default; their weights are frozen meanwhile, and stay so if they were.
        entered: freeze them only from the moment that this module is entered: what comes before it still trains.

    Raises:
        ValueError: nothing is trainable, or a layer's first axis is not the rows, so that they cannot be told apart.
    """
    scope = everything(model) if scope is None else scope
    parameters = [p for p in parameters_of(scope).values() if p.requires_grad]

    def freeze(*_: object) -> None:
        for p in parameters:
            p.requires_grad_(False)

    hooks: list[Any] = [m.register_forward_hook(_hook(names, rows, handler)) for m, names in scope.items()]
    if entered is None:
        freeze()
    else:
        hooks.append(entered.register_forward_pre_hook(freeze))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p in parameters:
            p.requires_grad_(True)


def materialize(layer: Layer, sizes: Sequence[int], first: int, sink: Sink) -> None:
    """Form each prompt's gradient of one layer's parameters, and send it to ``sink``.

    Args:
        layer: what ``capture`` found.
        sizes: rows of each prompt, in order; none is zero.
        first: number of the first of these prompts in the sink's count.
        sink: receives the gradients.
    """
    module, names, x, b = layer.module, layer.names, layer.x, layer.b
    everyone = slice(first, first + len(sizes))
    if isinstance(module, nn.Linear):
        x, b = x.reshape(len(x), -1, x.shape[-1]), b.reshape(len(b), -1, b.shape[-1])
        if "weight" in names and len(x) * module.weight.numel() <= WHOLE:
            sink(names["weight"], everyone, _per_prompt(_product(b.transpose(1, 2), x), sizes))
        elif "weight" in names:
            for p, (xp, bp) in enumerate(_parts(x, b, sizes), start=first):
                sink(names["weight"], slice(p, p + 1), _product(bp.flatten(0, 1).T, xp.flatten(0, 1)).unsqueeze(0))
        if "bias" in names:
            sink(names["bias"], everyone, _per_prompt(b.float().sum(1), sizes))
    elif isinstance(module, nn.Embedding) and len(sizes) * module.weight.numel() <= WHOLE:
        at = _owners(sizes, x.device)[:, None] * len(module.weight) + x.flatten(1)
        grads = torch.zeros(len(sizes) * len(module.weight), b.shape[-1], device=b.device)
        grads.index_add_(0, at.flatten(), b.flatten(0, -2).float())
        sink(names["weight"], everyone, grads.view(len(sizes), *module.weight.shape))
    elif isinstance(module, nn.Embedding):
        for p, (xp, bp) in enumerate(_parts(x, b, sizes), start=first):
            rows, at = xp.flatten().unique(return_inverse=True)
            grads = torch.zeros(len(rows), bp.shape[-1], device=b.device)
            sink(names["weight"], slice(p, p + 1), grads.index_add_(0, at, bp.flatten(0, -2).float())[None], rows)
    elif is_norm(module):
        sink(names["weight"], everyone, _per_prompt(layer.scale_gradients, sizes))
    else:
        for name, grads in layer_vjp(layer, sizes).items():
            sink(name, everyone, grads)


def is_norm(module: nn.Module) -> bool:
    """Return whether a layer is an RMS norm: every model has its own class, and all multiply entrywise by a scale."""
    return type(module).__name__.endswith("RMSNorm")


def _hook(names: dict[str, str], rows: int, handler: Callable[[Layer], None]) -> Callable[..., Tensor]:
    def forward(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        def meet(x: Tensor, b: Tensor) -> None:
            handler(Layer(module, names, x, b.detach()))

        x = inputs[0].detach()
        if len(x) != rows:
            raise ValueError(
                f"{type(module).__name__} holds {sorted(names.values())} but sees {len(x)} rows for {rows} rows of "
                "rollouts; train a LoRA adapter on other layers, or leave this layer out"
            )
        if not output.requires_grad:
            output.requires_grad_(True)  # the first trainable layer starts the graph
        visit = current()
        if visit is None:
            output.register_hook(lambda b: meet(x, b))
        elif visit.again:
            visit.give_input(visit.turn(), x)
        else:
            turn = visit.turn()
            output.register_hook(lambda b: visit.give_gradient(turn, b, meet))
        return output

    return forward


def _product(b: Tensor, x: Tensor) -> Tensor:
    """Return b x in float32. Half-precision factors are multiplied as they are on a GPU, and summed in float32."""
    if b.is_cuda and b.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(b, x, out_dtype=torch.float32) if b.dim() == 3 else torch.mm(b, x, out_dtype=torch.float32)
    return b.float() @ x.float()


def _per_prompt(of_rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Add the rows of each prompt."""
    if len(of_rows) == len(sizes):
        return of_rows
    out = torch.zeros(len(sizes), *of_rows.shape[1:], device=of_rows.device)
    return out.index_add_(0, _owners(sizes, of_rows.device), of_rows)


def _owners(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device)


def layer_vjp(layer: Layer, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Differentiate one layer on its own, prompt by prompt: exact for any layer whose rows are independent."""
    module, names = layer.module, layer.names
    warnings.warn(
        f"{type(module).__name__} has no closed form here: its gradients are taken prompt by prompt, which is exact "
        "but slower",
        stacklevel=2,
    )
    frozen = {key: getattr(module, key) for key in names}
    parts = []
    try:
        for xp, bp in _parts(layer.x, layer.b, sizes):
            weights = {key: p.detach().float().requires_grad_() for key, p in frozen.items()}
            module._parameters.update(weights)  # type: ignore[arg-type]
            with torch.enable_grad():
                out = module.forward(xp.float())  # not __call__, which would run the hooks again
            parts.append(torch.autograd.grad(out, list(weights.values()), bp.to(out.dtype)))
    finally:
        module._parameters.update(frozen)
    return {name: torch.stack([part[i] for part in parts]) for i, name in enumerate(names.values())}


def _parts(x: Tensor, b: Tensor, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(list(sizes)), b.split(list(sizes)), strict=True)
