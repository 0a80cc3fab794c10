r"""One policy gradient per prompt out of one backward pass.

    g_p = sum_{k in p, t} c_kt grad log pi(x_kt | s_kt)            c from ``pipeline.objective``

A batch holds the rollouts of several prompts, each prompt's rows adjacent; ``pipeline.capture`` takes every prompt's
share out of the backward pass of their sum. Each parameter's gradients go to a sink as soon as they exist and are then
freed, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from pipeline.capture import Layer, Sink, capture, materialize
from pipeline.objective import OBJECTIVES
from pipeline.packing import Row, pack, packed_logps, passes
from pipeline.policy import Policy
from pipeline.records import Rollouts
from pipeline.scope import Scope, everything, only

Handler = Callable[[Layer, list[int], int], None]
"""Takes a layer, the rows of each of its prompts, and the number of the first of them."""
Watch = Callable[[Rollouts, Float[np.ndarray, "rollouts tokens"]], None]
"""Takes the rollouts of some whole groups and their log-probabilities under the policy, 0 beyond a completion's end."""


def prompt_gradients(
    policy: Policy, rollouts: Rollouts, objective: str, sink: Sink, *, micro_tokens: int = 65_536
) -> list[str]:
    """Send each prompt's policy gradient to ``sink``; the prompts of ``rollouts`` form one batch.

    Args:
        policy: the policy at which the gradient is taken, with respect to its trainable parameters.
        rollouts: stored rollouts; the groups are their prompts, in order of first appearance.
        objective: name in ``pipeline.objective.OBJECTIVES``.
        sink: receives the gradients; see ``pipeline.capture.Sink``.
        micro_tokens: most tokens in one backward pass. Passes hold whole groups where a group fits; the parts of a
            larger group keep the coefficients that they have in the whole group, and are added.

    Returns:
        The prompt_uids, in the order that the sink's slices count in.

    Raises:
        FloatingPointError: a log-probability or coefficient is not finite; the message names the prompt.
    """

    def handler(layer: Layer, sizes: list[int], first: int) -> None:
        materialize(layer, sizes, first, sink)

    uids = list(rollouts.groups())
    for parts in passes(pack(rollouts), micro_tokens):
        backward(policy, rollouts, objective, handler, parts, uids)
    return uids


def backward(
    policy: Policy,
    rollouts: Rollouts,
    objective: str,
    handler: Handler,
    parts: list[list[Row]],
    uids: list[str],
    *,
    scope: Scope | None = None,
    watch: Watch | None = None,
) -> None:
    """Run the backward passes of some whole groups; with several passes the coefficients are made beforehand.

    Args:
        policy: differentiated.
        rollouts: all of the batch.
        objective: name of the objective.
        handler: receives each layer.
        parts: the passes, from ``pipeline.packing.passes``.
        uids: the prompts of the batch, in order.
        scope: the layers to differentiate; all that train by default.
        watch: sees the log-probabilities.
    """
    members = [i for rows in parts for row in rows for i in row.rollouts]
    group = rollouts.take(members)
    owner = np.array([row.prompt for rows in parts for row in rows for _ in row.rollouts])
    known = None if len(parts) == 1 else logps_of(policy, rollouts, parts)
    weights = None if known is None else coefficients(objective, known, group, owner, uids)
    layers = everything(policy.model) if scope is None else scope
    start = 0
    for rows in parts:
        first = rows[0].prompt
        sizes = np.bincount([row.prompt - first for row in rows]).tolist()
        with (
            only(policy.model, layers),
            capture(policy.model, len(rows), partial(_hand, handler, sizes, first), scope=layers),
        ):
            logp = packed_logps(policy, rollouts, rows)
            if weights is None:
                known = logp.detach().cpu().numpy()
                weights = coefficients(objective, known, group, owner, uids)
            c = weights[start : start + len(logp), : logp.shape[1]]
            (logp * torch.from_numpy(c).to(logp)).sum().backward()
        start += len(logp)
    if watch is not None and known is not None:
        watch(group, known)


def coefficients(
    objective: str, logp_new: np.ndarray, rollouts: Rollouts, owner: np.ndarray, uids: list[str]
) -> Float[np.ndarray, "rollouts tokens"]:
    """Return the objective's coefficients c of some rollouts whose prompts are ``uids[owner]``.

    Raises:
        ValueError: there is no such objective.
        FloatingPointError: a log-probability or coefficient is not finite; the message names the prompt.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective = {objective!r}: choose one of {sorted(OBJECTIVES)}")
    logp_old = np.zeros(logp_new.shape)
    mask = np.zeros(logp_new.shape, bool)
    for row, logp in enumerate(rollouts.logp_old):
        logp_old[row, : len(logp)] = logp
        mask[row, : len(logp)] = True
    c = OBJECTIVES[objective](logp_new.astype(float), logp_old, mask, np.array(rollouts.reward, float), owner)
    bad = ~np.isfinite(c).all(axis=1) | ~np.isfinite(logp_new).all(axis=1)
    if bad.any():
        raise FloatingPointError(
            f"prompt {uids[owner[int(np.flatnonzero(bad)[0])]]}: its log-probabilities under the policy are not "
            "finite; the checkpoint has diverged, or its dtype overflows"
        )
    return c


def _hand(handler: Handler, sizes: list[int], first: int, layer: Layer) -> None:
    handler(layer, sizes, first)


def logps_of(policy: Policy, rollouts: Rollouts, parts: list[list[Row]]) -> Float[np.ndarray, "rollouts tokens"]:
    """Return the log-probabilities of a group that takes several passes: its coefficients need all of them."""
    with torch.no_grad():
        found = [packed_logps(policy, rollouts, rows).cpu().numpy() for rows in parts]
    width = max(part.shape[1] for part in found)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in found])
