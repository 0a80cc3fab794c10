r"""Features: each prompt's policy gradient, projected as it is made.

    z_p = R M^(1/2) g_p        R from ``pipeline.projection`` or ``pipeline.factored``, g from ``pipeline.gradients``

M is the diagonal metric of an optimizer, the identity unless one is given: <z_p, z_q> = g_p M g_q to the error of R,
which is the effect of an Adam step on p upon q (LESS, arXiv:2402.04333, preconditions one side).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.capture import Layer, is_norm, layer_vjp, materialize
from pipeline.factored import FactoredProjection
from pipeline.gradients import Handler, Watch, backward, prompt_gradients
from pipeline.packing import pack, passes
from pipeline.policy import Policy
from pipeline.projection import SparseProjection
from pipeline.records import Rollouts
from pipeline.scope import Scope, parameters_of

Projection = SparseProjection | FactoredProjection


def sketch_gradients(
    policy: Policy,
    rollouts: Rollouts,
    objective: str,
    projection: Projection,
    *,
    micro_tokens: int = 65_536,
    metric: Mapping[str, Tensor] | None = None,
    scope: Scope | None = None,
    watch: Watch | None = None,
) -> tuple[list[str], Float[np.ndarray, "prompts dim"]]:
    """Return each prompt's projected gradient; no full gradient outlives its own parameter's turn.

    Args:
        policy: as in ``prompt_gradients``, like the next two.
        rollouts: stored rollouts.
        objective: name of the objective.
        projection: see ``projection_for``.
        micro_tokens: most tokens in one backward pass.
        metric: M by parameter name, see ``adam_metric``; the identity by default.
        scope: the layers to differentiate, those of the projection; all that train by default.
        watch: sees the log-probabilities that the pass makes anyway.

    Raises:
        FloatingPointError: a gradient is not finite; the message names the prompt and the parameter.
        ValueError: a metric is given with a projection that never sees single coordinates.
    """
    if metric is not None and isinstance(projection, FactoredProjection):
        raise ValueError("metric: a factored projection never forms single coordinates; use the sparse one")
    root = {name: m.sqrt() for name, m in metric.items()} if metric is not None else None
    uids, sketches = list(rollouts.groups()), []
    for parts in passes(pack(rollouts), micro_tokens):
        members = [row.prompt for rows in parts for row in rows]
        start, count = members[0], members[-1] - members[0] + 1
        table = projection.zeros(count, policy.device)
        handler = sketcher(projection, table, start, root)
        backward(policy, rollouts, objective, handler, parts, uids, scope=scope, watch=watch)
        sketches.append(projection.finish(table).cpu().numpy())
    rows = np.concatenate(sketches) if sketches else np.empty((0, projection.dim_out), np.float32)
    refuse_infinite(policy, rollouts, objective, uids, rows, micro_tokens)
    return uids, rows


def project(projection: Projection, gradient: Mapping[str, Tensor]) -> Float[np.ndarray, " dim"]:
    """Return the sketch of one gradient that is at hand whole, by parameter; those outside the layout are left out."""
    table = projection.zeros(1, next(iter(gradient.values())).device)
    for name in projection.layout:
        grad = gradient[name][None]
        if isinstance(projection, SparseProjection):
            projection.add(table, name, grad.flatten(1))
        else:
            table += projection.whole(name, grad) if grad.dim() == 3 else projection.vector(name, grad.flatten(1))
    return projection.finish(table)[0].cpu().numpy()


def projection_for(
    policy: Policy,
    dim_out: int,
    *,
    kind: str = "sparse",
    keep: float = 1.0,
    seed: int = 0,
    scope: Scope | None = None,
) -> Projection:
    """Return the ``sparse`` or ``factored`` projection of a policy's trainable parameters, or of those in a scope."""
    parameters = policy.trainable() if scope is None else parameters_of(scope)
    layout = {name: p.numel() for name, p in parameters.items()}
    if kind == "sparse":
        return SparseProjection(sum(layout.values()), dim_out, keep=keep, seed=seed, layout=layout)
    if kind == "factored" and keep == 1.0:
        return FactoredProjection(dim_out, seed=seed, layout=layout)
    raise ValueError(f"kind = {kind!r}, keep = {keep}: sparse, or factored with keep = 1")


def adam_metric(
    policy: Policy, state: Mapping[str, Tensor], *, beta: float, epsilon: float = 1e-8
) -> dict[str, Tensor]:
    """Return Adam's diagonal metric, M = 1 / (sqrt(v / (1 - beta^step)) + epsilon), by parameter name.

    Args:
        policy: whose trainable parameters are measured.
        state: optimizer state by ``parameter/part``, as ``pipeline.optimization.optimizer_state`` gives it.
        beta: decay of the second moment.
        epsilon: as in Adam.

    Raises:
        ValueError: a trainable parameter has no state.
    """
    absent = [name for name in policy.trainable() if f"{name}/exp_avg_sq" not in state]
    if absent:
        raise ValueError(
            f"optimizer state lacks {absent[0]!r}, one of {len(absent)}: give the state of this policy's run"
        )
    return {
        name: 1 / ((state[f"{name}/exp_avg_sq"].float() / (1 - beta ** float(state[f"{name}/step"]))).sqrt() + epsilon)
        for name in policy.trainable()
    }


def sketcher(
    projection: Projection, table: Tensor, start: int = 0, root: Mapping[str, Tensor] | None = None
) -> Handler:
    """Return a handler for ``backward`` that adds to ``table``, whose first row is prompt ``start``."""

    def sink(name: str, prompts: slice, grads: Tensor, rows: Tensor | None = None) -> None:
        assert isinstance(projection, SparseProjection)
        into = table[prompts.start - start : prompts.stop - start]
        if root is not None:
            grads = grads * (root[name] if rows is None else root[name][rows])
        if rows is None:
            projection.add(into, name, grads.flatten(1))
        else:
            projection.add_rows(into[0], name, grads[0], rows)

    def form(layer: Layer, sizes: list[int], first: int) -> None:
        materialize(layer, sizes, first, sink)

    def factor(layer: Layer, sizes: list[int], first: int) -> None:
        assert isinstance(projection, FactoredProjection)
        owner = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(table.device) + (first - start)
        for of_rows in _factored(projection, layer):
            table.index_add_(0, owner, of_rows)
        if not isinstance(layer.module, nn.Linear | nn.Embedding) and not is_norm(layer.module):
            for name, grads in layer_vjp(layer, sizes).items():
                table[first - start : first - start + len(sizes)] += projection.vector(name, grads.flatten(1))

    return form if isinstance(projection, SparseProjection) else factor


def _factored(projection: FactoredProjection, layer: Layer) -> list[Tensor]:
    """Return the sketches of each row's share of the layer's parameters, where they have a closed form."""
    module, names, x, b = layer.module, layer.names, layer.x, layer.b
    if isinstance(module, nn.Linear):
        x, b = x.reshape(len(x), -1, x.shape[-1]), b.reshape(len(b), -1, b.shape[-1])
        made = [projection.product(names["weight"], x, b)] if "weight" in names else []
        return made + ([projection.vector(names["bias"], b.float().sum(1))] if "bias" in names else [])
    if isinstance(module, nn.Embedding):
        return [projection.looked_up(names["weight"], x.flatten(1), b.flatten(1, -2), vocabulary=len(module.weight))]
    if is_norm(module):
        return [projection.vector(names["weight"], layer.scale_gradients)]
    return []


def refuse_infinite(
    policy: Policy, rollouts: Rollouts, objective: str, uids: list[str], rows: np.ndarray, micro_tokens: int
) -> None:
    """Where the sketch of a prompt is not finite, find the parameter whose gradient is not, and raise.

    Raises:
        FloatingPointError: it names the first such prompt and its parameter.
    """
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if not len(bad):
        return
    uid = uids[int(bad[0])]
    broken: list[str] = []

    def sink(name: str, prompts: slice, grads: Tensor, rows: Tensor | None = None) -> None:
        if not bool(grads.isfinite().all()):
            broken.append(name)

    prompt_gradients(policy, rollouts.take(rollouts.groups()[uid]), objective, sink, micro_tokens=micro_tokens)
    where = f"of parameter {broken[0]!r} " if broken else ""
    raise FloatingPointError(
        f"prompt {uid}: its gradient {where}is not finite; look at its rollouts, at the checkpoint and at the dtype "
        f"({policy.model.dtype})"
    )
