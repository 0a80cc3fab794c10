r"""One policy gradient per prompt out of one backward pass.

    g_p = sum_{k in p, t} c_kt grad log pi(x_kt | s_kt)            c from ``pipeline.objective``

A batch holds the rollouts of several prompts, each prompt's rows adjacent. Rows are independent in a transformer, so
the backward pass of the sum over all prompts already holds, at each layer, every row's input a and output gradient b;
the gradient of a prompt is the product of its own rows:

    linear       G_p = sum_{rows of p, t} b a^T            (out, in)
    embedding    G_p[v] = sum_{rows of p, t : x_t = v} b
    any other    vector-Jacobian product of the layer alone, on the rows of p

Each parameter's gradients go to a ``sink`` as soon as they exist and are then freed, in float32. The weights themselves
are frozen meanwhile, so that autograd does not form the batch gradient a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.objective import OBJECTIVES
from pipeline.packing import Row, pack, packed_logps, passes
from pipeline.policy import Policy
from pipeline.projection import SparseProjection
from pipeline.records import Rollouts

Sink = Callable[[str, Tensor], None]
"""Takes a parameter's name and gradients, (prompts, *shape); may be called several times a parameter, to be added."""


@contextmanager
def capture(model: nn.Module, sizes: Sequence[int], sink: Sink) -> Iterator[None]:
    """Send per-prompt gradients of every trainable parameter to ``sink`` during a forward and backward pass.

    Args:
        model: rows of its inputs are rollouts; the rows of a prompt are adjacent.
        sizes: rollouts of each prompt, in order.
        sink: receives the gradients.

    Raises:
        ValueError: a layer's first axis is not the rollouts, so that its rows cannot be told apart.
    """
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    owned = {
        module: {key: trainable[id(p)] for key, p in module.named_parameters(recurse=False) if id(p) in trainable}
        for module in model.modules()
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    hooks = [module.register_forward_hook(_hook(names, list(sizes), sink)) for module, names in owned.items() if names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for p in parameters:
            p.requires_grad_(True)


def prompt_gradients(
    policy: Policy, rollouts: Rollouts, objective: str, sink: Sink, *, micro_tokens: int = 65_536
) -> list[str]:
    """Send each prompt's policy gradient to ``sink``; the prompts of ``rollouts`` form one batch.

    Args:
        policy: the policy at which the gradient is taken.
        rollouts: stored rollouts; the groups are their prompts, in order of first appearance.
        objective: name in ``pipeline.objective.OBJECTIVES``.
        sink: receives (prompts, *shape) gradients for each parameter, possibly in several parts.
        micro_tokens: most tokens in one backward pass. Passes hold whole groups where a group fits; the parts of a
            larger group keep the coefficients that they have in the whole group, and are added.

    Returns:
        The prompt_uids, in the order of the first axis of the gradients.

    Raises:
        FloatingPointError: a log-probability or coefficient is not finite; the message names the prompt.
    """
    uids = list(rollouts.groups())
    for parts in passes(pack(rollouts), micro_tokens):
        _backward(policy, rollouts, objective, sink, parts, uids)
    return uids


def sketch_gradients(
    policy: Policy, rollouts: Rollouts, objective: str, projection: SparseProjection, *, micro_tokens: int = 65_536
) -> tuple[list[str], Float[np.ndarray, "prompts dim"]]:
    """Return each prompt's projected gradient; no full gradient outlives its own parameter's turn."""
    groups, sketches = rollouts.groups(), []
    uids = list(groups)
    for parts in passes(pack(rollouts), micro_tokens):
        members = dict.fromkeys(uids[row.prompt] for rows in parts for row in rows)
        part = rollouts.take([i for uid in members for i in groups[uid]])
        sketches.append(_sketch(policy, part, objective, projection, micro_tokens))
    rows = np.concatenate(sketches) if sketches else np.empty((0, projection.dim_out), np.float32)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        bad = uids[int(np.flatnonzero(~finite)[0])]
        raise FloatingPointError(f"gradient of prompt {bad} is not finite; look at its rollouts and at the dtype")
    return uids, rows


def projection_for(policy: Policy, dim_out: int, *, keep: float = 1.0, seed: int = 0) -> SparseProjection:
    """Return the projection of this policy's trainable parameters."""
    layout = {name: p.numel() for name, p in policy.trainable().items()}
    return SparseProjection(sum(layout.values()), dim_out, keep=keep, seed=seed, layout=layout)


def _hook(names: dict[str, str], sizes: list[int], sink: Sink) -> Callable[..., Tensor]:
    def forward(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach()
        if len(x) != sum(sizes):
            raise ValueError(
                f"{type(module).__name__} holds {sorted(names.values())} but sees {len(x)} rows for {sum(sizes)} "
                "rollouts; train a LoRA adapter on other layers, or leave this layer out"
            )
        if not output.requires_grad:
            output.requires_grad_(True)  # the first trainable layer starts the graph
        output.register_hook(lambda b: _emit(module, names, x, b.detach(), sizes, sink))
        return output

    return forward


def _emit(module: nn.Module, names: dict[str, str], x: Tensor, b: Tensor, sizes: list[int], sink: Sink) -> None:
    if isinstance(module, nn.Linear):
        x, b = x.float(), b.float()
        if "weight" in names:
            sink(names["weight"], torch.stack([_flat(bp).T @ _flat(xp) for xp, bp in _parts(x, b, sizes)]))
        if "bias" in names:
            sink(names["bias"], torch.stack([_flat(bp).sum(0) for _, bp in _parts(x, b, sizes)]))
    elif isinstance(module, nn.Embedding):
        shape = (module.num_embeddings, module.embedding_dim)
        grads = torch.zeros(len(sizes), *shape, device=b.device)
        for p, (xp, bp) in enumerate(_parts(x, b.float(), sizes)):
            grads[p].index_add_(0, xp.flatten(), _flat(bp))
        sink(names["weight"], grads)
    else:
        for name, grads in _layer_vjp(module, names, x, b, sizes).items():
            sink(name, grads)


def _layer_vjp(
    module: nn.Module, names: dict[str, str], x: Tensor, b: Tensor, sizes: list[int]
) -> dict[str, Float[Tensor, "prompts ..."]]:
    """Differentiate one layer on its own, prompt by prompt: exact for any layer whose rows are independent."""
    frozen = {key: getattr(module, key) for key in names}
    parts = []
    try:
        for xp, bp in _parts(x, b, sizes):
            weights = {key: p.detach().float().requires_grad_() for key, p in frozen.items()}
            module._parameters.update(weights)  # type: ignore[arg-type]
            with torch.enable_grad():
                out = module.forward(xp.float())  # not __call__, which would run the hooks again
            parts.append(torch.autograd.grad(out, list(weights.values()), bp.to(out.dtype)))
    finally:
        module._parameters.update(frozen)
    return {name: torch.stack([part[i] for part in parts]) for i, name in enumerate(names.values())}


def _parts(x: Tensor, b: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(sizes), b.split(sizes), strict=True)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _backward(
    policy: Policy, rollouts: Rollouts, objective: str, sink: Sink, parts: list[list[Row]], uids: list[str]
) -> None:
    """Run the backward passes of some whole groups; with several passes the coefficients are made beforehand."""
    members = [i for rows in parts for row in rows for i in row.rollouts]
    group = rollouts.take(members)
    owner = np.array([row.prompt for rows in parts for row in rows for _ in row.rollouts])
    weights = None if len(parts) == 1 else _coefficients(objective, _known(policy, rollouts, parts), group, owner, uids)
    start = 0
    for rows in parts:
        sizes = np.bincount([row.prompt for row in rows], minlength=len(uids)).tolist()
        with capture(policy.model, sizes, sink):
            logp = packed_logps(policy, rollouts, rows)
            if weights is None:
                weights = _coefficients(objective, logp.detach().cpu().numpy(), group, owner, uids)
            c = weights[start : start + len(logp), : logp.shape[1]]
            (logp * torch.from_numpy(c).to(logp)).sum().backward()
        start += len(logp)


def _known(policy: Policy, rollouts: Rollouts, parts: list[list[Row]]) -> np.ndarray:
    """Return the log-probabilities of a group that takes several passes: its coefficients need all of them."""
    with torch.no_grad():
        found = [packed_logps(policy, rollouts, rows).cpu().numpy() for rows in parts]
    width = max(part.shape[1] for part in found)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in found])


def _sketch(
    policy: Policy, rollouts: Rollouts, objective: str, projection: SparseProjection, micro_tokens: int
) -> Float[np.ndarray, "prompts dim"]:
    sketch = projection.zeros(len(rollouts.groups()), policy.device)

    def sink(name: str, grads: Tensor) -> None:
        projection.add(sketch, name, grads.flatten(1))

    prompt_gradients(policy, rollouts, objective, sink, micro_tokens=micro_tokens)
    return sketch.cpu().numpy()


def _coefficients(
    objective: str, logp_new: np.ndarray, rollouts: Rollouts, owner: np.ndarray, uids: list[str]
) -> np.ndarray:
    if objective not in OBJECTIVES:
        raise ValueError(f"objective = {objective!r}: choose one of {sorted(OBJECTIVES)}")
    width = logp_new.shape[1]
    logp_old = np.zeros(logp_new.shape)
    mask = np.zeros(logp_new.shape, bool)
    for row, logp in enumerate(rollouts.logp_old):
        logp_old[row, : len(logp)] = logp
        mask[row, : len(logp)] = True
    assert width >= max(map(len, rollouts.logp_old))
    c = OBJECTIVES[objective](logp_new.astype(float), logp_old, mask, np.array(rollouts.reward, float), owner)
    bad = ~np.isfinite(c).all(axis=1) | ~np.isfinite(logp_new).all(axis=1)
    if bad.any():
        raise FloatingPointError(
            f"prompt {uids[owner[int(np.flatnonzero(bad)[0])]]}: its log-probabilities under the policy are not "
            "finite; the checkpoint has diverged, or its dtype overflows"
        )
    return c
