"""Which parameters a gradient is taken of: all that train, those that patterns name, or the last block and the head.

A scope maps each layer to its parameters, attribute to name. Layers rather than names alone, because a tied matrix is
two layers: the head, at the end, and the embedding, at the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import Tensor, nn

Scope = dict[nn.Module, dict[str, str]]


def everything(model: nn.Module) -> Scope:
    """Return every layer that holds a trainable parameter.

    Raises:
        ValueError: there is none.
    """
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    scope = {
        module: {key: trainable[id(p)] for key, p in module.named_parameters(recurse=False) if id(p) in trainable}
        for module in model.modules()
    }
    if not trainable:
        raise ValueError("model has no trainable parameter: unfreeze some, or add an adapter")
    return {module: names for module, names in scope.items() if names}


def named(model: nn.Module, patterns: Sequence[str]) -> Scope:
    """Return the layers that hold a trainable parameter whose name matches one of ``patterns`` (``*`` is any text).

    Raises:
        ValueError: a pattern matches nothing; the message has some of the names that there are.
    """
    whole = everything(model)
    known = sorted({name for names in whole.values() for name in names.values()})
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"layers: {pattern!r} matches no trainable parameter; there are {', '.join(known[:8])}, ..."
            )
    scope = {
        module: {key: name for key, name in names.items() if any(fnmatchcase(name, p) for p in patterns)}
        for module, names in whole.items()
    }
    return {module: names for module, names in scope.items() if names}


def last_block(model: nn.Module) -> tuple[nn.Module, Scope]:
    """Return the last transformer block, and the scope of that block and of all that follows it, the head included.

    Raises:
        ValueError: the model has no list of blocks, or nothing in its last block or head trains.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no list of blocks; use the exact way")
    before = {id(m) for block in blocks[:-1] for m in block.modules()}
    whole = everything(model)
    scope = {m: names for m, names in whole.items() if id(m) not in before and not isinstance(m, nn.Embedding)}
    if not scope:
        raise ValueError("nothing in the last block or the head trains; use the exact way, or adapt those layers")
    return blocks[-1], scope


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks, first to last: the longest list of layers by parameters, or nothing."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return list(max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()), default=()))


def parameters_of(scope: Scope) -> dict[str, Tensor]:
    """Return the parameters of a scope by name; tied ones once."""
    return {name: getattr(module, key) for module, names in scope.items() for key, name in names.items()}


@contextmanager
def only(model: nn.Module, scope: Scope) -> Iterator[None]:
    """Freeze every parameter outside ``scope`` meanwhile."""
    inside = {id(p) for p in parameters_of(scope).values()}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)
