r"""Dot score of each prompt against one target, from forward passes alone.

    <g_p, v> = d/de J_p(theta + e v) at e = 0,               J_p = sum_{k in p, t} c_kt log pi(x_kt | s_kt)
             = sum_{k in p, t} c_kt (l+_kt - l-_kt) / 2e  +  O(e^2),      l+- = log pi at theta +- e v

g_p  policy gradient of prompt p, never formed               (dim,)
v    the target: the mean gradient of a validation set       (dim,)
c    from ``pipeline.objective``, at log-probabilities (l+ + l-) / 2: those at theta up to e^2, without a third pass
e    moves log-probabilities by ``CHANGE`` on average: far above float32 rounding, far below curvature

A step that is a share of |theta| will not do: 3e-5 |theta| moves the embedded policy by 2e-3 nats, a LoRA adapter on it
by 3e-5 (rounding) and a model of 135 M parameters by 0.4 (curvature). Hence a trial on a few rows.
It projects nothing, keeps no graph and needs no hooks: two forward passes a target, against one forward and one
backward pass for all targets. It gives no norms, so no cosine. The weights are replaced while a pass runs and put back
untouched. A policy that is not in float32 is evaluated in a float32 copy: in bfloat16 the difference drowns in
rounding, and forward-mode differentiation in bfloat16 is off by some percent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.gradients import coefficients
from pipeline.packing import Row, pack, packed_logps
from pipeline.policy import Policy
from pipeline.records import Rollouts
from pipeline.weighted import plain

CHANGE = 5e-3  # mean |l+ - l-| / 2 [nats]
FIRST = 3e-5  # |e v| / |theta| of the trial that finds e
TRIED = 4  # rows of the trial
LARGEST = 100.0  # the trial is stretched by no more: a target that hardly moves these rollouts has a score near zero


def target_direction(
    policy: Policy, rollouts: Rollouts, objective: str, *, size: int, micro_tokens: int = 65_536
) -> dict[str, Tensor]:
    """Return the mean policy gradient of a validation set, a float32 tensor a trainable parameter.

    Args:
        policy: the policy at which the gradient is taken.
        rollouts: those of the validation prompts; prompts without signal may be left out.
        objective: name in ``pipeline.objective.OBJECTIVES``.
        size: prompts of the validation set; those that were left out have gradient zero and count in the mean.
        micro_tokens: most tokens in one backward pass.

    Raises:
        ValueError: ``size`` is smaller than the number of prompts in ``rollouts``.
    """
    groups = len(rollouts.groups())
    if size < max(1, groups):
        raise ValueError(f"size = {size}: rollouts hold {groups} prompts; give the size of the whole validation set")
    exact = in_float32(policy)
    parameters = exact.trainable()
    before = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    try:
        plain(exact, rollouts, objective, micro_tokens=micro_tokens)
        return {n: torch.zeros_like(p) if p.grad is None else p.grad / size for n, p in parameters.items()}
    finally:
        for name, p in parameters.items():
            p.grad = before[name]


def dot_scores(
    policy: Policy, rollouts: Rollouts, objective: str, direction: Mapping[str, Tensor], *, batch_tokens: int = 4096
) -> tuple[list[str], Float[np.ndarray, " prompts"]]:
    """Return the prompt_uids, in order of first appearance, and each one's inner product with ``direction``.

    Args:
        policy: the policy at which the scores are taken; unchanged afterwards, also after an error.
        rollouts: stored rollouts of the prompts.
        objective: name in ``pipeline.objective.OBJECTIVES``.
        direction: a tensor for each trainable parameter; see ``target_direction``.
        batch_tokens: most padded tokens in one forward pass; on a CPU few, so that activations stay in its cache.

    Raises:
        ValueError: the direction does not fit the trainable parameters, is not finite, or is zero.
        FloatingPointError: a log-probability or coefficient is not finite; the message names the prompt.
    """
    exact = in_float32(policy)
    v = _checked(exact, direction)
    groups = rollouts.groups()
    if not groups:
        return [], np.empty(0)
    rows = sorted(pack(rollouts), key=lambda row: (len(rollouts.prompt_ids[row.rollouts[0]]), row.tokens))
    e = _step(exact, rollouts, rows[:: -(-len(rows) // TRIED)], v, batch_tokens)
    plus, minus = _both(exact, rollouts, rows, v, e, batch_tokens)
    uids = list(groups)
    number = {uid: p for p, uid in enumerate(uids)}
    owner = np.array([number[uid] for uid in rollouts.prompt_uid])
    c = coefficients(objective, (plus + minus) / 2, rollouts, owner, uids)
    return uids, np.bincount(owner, weights=(c * (plus - minus)).sum(axis=1) / (2 * e), minlength=len(uids))


def _step(policy: Policy, rollouts: Rollouts, rows: Sequence[Row], v: Mapping[str, Tensor], batch_tokens: int) -> float:
    """Return e: a trial step on a few rows, stretched until it changes their log-probabilities as wanted."""
    e = FIRST * (_norm(policy.trainable()) or 1.0) / _norm(v)
    plus, minus = _both(policy, rollouts, rows, v, e, batch_tokens)
    tokens = sum(len(rollouts.completion_ids[i]) for row in rows for i in row.rollouts)
    change = float(np.abs(plus - minus).sum()) / 2 / max(1, tokens)
    return e * min(LARGEST, CHANGE / change) if change > 0 else e


def _both(
    policy: Policy, rollouts: Rollouts, rows: Sequence[Row], v: Mapping[str, Tensor], e: float, batch_tokens: int
) -> tuple[Float[np.ndarray, "rollouts tokens"], Float[np.ndarray, "rollouts tokens"]]:
    """Return the log-probabilities at theta + e v and at theta - e v; 0 for rollouts that are in none of the rows."""
    sides = []
    for step in (e, -e):
        with _moved(policy, v, step):
            sides.append(_logps(policy, rollouts, rows, batch_tokens))
    return sides[0], sides[1]


@contextmanager
def _moved(policy: Policy, v: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """Let the trainable parameters be theta + step v; their own storage is put aside and not written to."""
    kept = {name: p.data for name, p in policy.trainable().items()}
    try:
        for name, p in policy.trainable().items():
            p.data = torch.add(kept[name], v[name], alpha=step)
        yield
    finally:
        for name, p in policy.trainable().items():
            p.data = kept[name]


@torch.inference_mode()
def _logps(
    policy: Policy, rollouts: Rollouts, rows: Sequence[Row], batch_tokens: int
) -> Float[np.ndarray, "rollouts tokens"]:
    out = np.zeros((len(rollouts), max(map(len, rollouts.completion_ids))))
    for batch in _batches(rows, batch_tokens):
        members = [i for row in batch for i in row.rollouts]
        logp = packed_logps(policy, rollouts, batch).cpu().numpy()
        out[members, : logp.shape[1]] = logp
    return out


def _batches(rows: Sequence[Row], batch_tokens: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * max(r.tokens for r in [*batch, row]) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def in_float32(policy: Policy) -> Policy:
    """Return the policy itself where it is float32, else a copy with the same weights, held in float32."""
    if all(p.dtype == torch.float32 for p in policy.model.parameters()):
        return policy
    return Policy(copy.deepcopy(policy.model).float(), policy.tokenizer)


def _checked(policy: Policy, direction: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the direction in float32, on the device of the parameters that it fits."""
    wanted = {name: tuple(p.shape) for name, p in policy.trainable().items()}
    given = {name: tuple(part.shape) for name, part in direction.items()}
    if wanted != given:
        odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        raise ValueError(
            f"direction[{odd[0]!r}] has shape {given.get(odd[0])}, the policy's parameter {wanted.get(odd[0])}; "
            "make it with target_direction from this policy"
        )
    v = {name: part.to(policy.device, torch.float32) for name, part in direction.items()}
    norm = _norm(v)
    if not np.isfinite(norm) or norm == 0:
        raise ValueError(f"direction has length {norm}: no way to go; leave a validation set without gradient out")
    return v


def _norm(parts: Mapping[str, Tensor]) -> float:
    return float(
        np.linalg.norm([float(torch.linalg.vector_norm(p.detach(), dtype=torch.float64)) for p in parts.values()])
    )
