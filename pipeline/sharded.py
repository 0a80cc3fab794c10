r"""Features of a policy whose weights several processes share: each adds what its own rollouts give, in k numbers.

    z_p = sum_r R g_p^(r)        g_p^(r)  what the rollouts on rank r add to the gradient of prompt p
                                 R        the same projection on all ranks, and as in one process

``fully_shard`` (Zhao et al., arXiv:2304.11277, in its second version) keeps 1 / ranks of every matrix on each rank and
brings a decoder block together while it computes. Weights are all that it moves: they are frozen, and
``pipeline.capture`` forms each prompt's gradient where its rollouts are, layer by layer, and adds it to that rank's
table. A group that fits one pass is on one rank whole; a larger one is dealt over all ranks, which exchange its
log-probabilities before its coefficients are made. Gradients are never communicated, only k numbers a prompt. (One
backward pass a prompt, its gradients reduced to the ranks' shards, would move all weights and the whole gradient for
each prompt.)

Every rank makes the same number of forward and backward passes, since each brings blocks together: one that has nothing
to do makes a pass whose gradients go nowhere. A rank that raises leaves the others waiting; whoever started the group
ends it (``flows.ranks``).
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from pipeline.capture import Layer, capture
from pipeline.features import Projection, refuse_infinite, sketcher
from pipeline.gradients import Handler, Watch, coefficients
from pipeline.packing import Row, pack, packed_logps, passes
from pipeline.policy import Policy
from pipeline.records import Rollouts
from pipeline.scope import Scope, everything, only


def sketch_gradients(
    policy: Policy,
    rollouts: Rollouts,
    objective: str,
    projection: Projection,
    *,
    micro_tokens: int = 65_536,
    scope: Scope | None = None,
    watch: Watch | None = None,
) -> tuple[list[str], Float[np.ndarray, "prompts dim"]]:
    """Return each prompt's projected gradient, on every rank; every rank calls this with the same arguments.

    Args:
        policy: from ``pipeline.fsdp.load_sharded``.
        rollouts: stored rollouts.
        objective: name of the objective.
        projection: see ``pipeline.features.projection_for``.
        micro_tokens: most tokens in one backward pass of one rank.
        scope: the layers to differentiate, those of the projection; all that train by default.
        watch: sees the log-probabilities of all rollouts, on every rank.

    Raises:
        FloatingPointError: a log-probability or gradient is not finite; the message names the prompt.
    """
    uids = list(rollouts.groups())
    if not uids:
        return uids, np.empty((0, projection.dim_out), np.float32)
    work = _Work(policy, rollouts, objective, projection, everything(policy.model) if scope is None else scope)
    with only(policy.model, {}):  # so that nothing but weights is ever communicated
        small, large = _deal(pack(rollouts), micro_tokens, work.ranks)
        for turn in range(0, len(small), work.ranks):
            work.group(small[turn : turn + work.ranks])
        for parts in large:
            work.group_in_parts(parts)
        for module in policy.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    logps = _sum(work.logps)
    if watch is not None:
        watch(rollouts.take(work.seen), logps[work.seen].cpu().numpy())
    rows = _sum(projection.finish(work.table)).cpu().numpy()
    refuse_infinite(policy, rollouts, objective, uids, rows, micro_tokens)
    return uids, rows


class _Work:
    """What the passes of one rank add to: its table of sketches, and the log-probabilities that it has seen."""

    def __init__(
        self, policy: Policy, rollouts: Rollouts, objective: str, projection: Projection, scope: Scope
    ) -> None:
        self.policy, self.rollouts, self.objective, self.scope = policy, rollouts, objective, scope
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.uids = list(rollouts.groups())
        self.table = projection.zeros(len(self.uids), policy.device)
        self.sketch: Handler = sketcher(projection, self.table)
        width = max(map(len, rollouts.completion_ids))
        self.logps = torch.zeros(len(rollouts), width, device=policy.device)
        self.seen: list[int] = []  # rollouts by all ranks, in the order of the prompts
        self.idle = [min(pack(rollouts), key=lambda row: row.tokens)]

    def group(self, dealt: list[list[Row]]) -> None:
        """Take one pass of whole groups on each rank; ``dealt`` holds the rows of each rank that has some."""
        self.backward(dealt[self.rank] if self.rank < len(dealt) else None)
        self.seen += [i for rows in dealt for i in _members(rows)]

    def group_in_parts(self, parts: list[list[Row]]) -> None:
        """Take one group whose passes are dealt over the ranks: log-probabilities first, then the backward passes."""
        turns = -(-len(parts) // self.ranks)
        mine = [*parts[self.rank :: self.ranks], None][:turns]
        for rows in mine:
            with torch.no_grad():
                logp = packed_logps(self.policy, self.rollouts, rows or self.idle)
            if rows:
                self.logps[_members(rows), : logp.shape[1]] = logp
        members = [i for rows in parts for i in _members(rows)]
        known = np.zeros(self.logps.shape, np.float32)
        known[members] = _sum(self.logps[members]).cpu().numpy()
        weights = np.zeros(self.logps.shape)
        weights[members] = self.weigh(known[members], [row for rows in parts for row in rows])
        for rows in mine:
            self.backward(rows, weights)
        self.seen += members

    def weigh(self, known: np.ndarray, rows: list[Row]) -> np.ndarray:
        """Return the coefficients of the rollouts of some rows, given their log-probabilities."""
        owner = np.array([row.prompt for row in rows for _ in row.rollouts])
        return coefficients(self.objective, known, self.rollouts.take(_members(rows)), owner, self.uids)

    def backward(self, rows: list[Row] | None, weights: np.ndarray | None = None) -> None:
        """Take one pass; None is a pass for nothing. Without ``weights``, (rollouts, tokens), it makes its own."""
        taken = rows or self.idle
        first = taken[0].prompt
        sizes = np.bincount([row.prompt - first for row in taken]).tolist()

        def keep(layer: Layer) -> None:
            if rows:
                self.sketch(layer, sizes, first)

        with capture(self.policy.model, len(taken), keep, scope=self.scope):
            logp = packed_logps(self.policy, self.rollouts, taken)
            c = np.zeros(logp.shape)
            if rows:
                known = logp.detach()
                self.logps[_members(rows), : logp.shape[1]] = known
                c = self.weigh(known.cpu().numpy(), rows) if weights is None else weights[_members(rows)]
            (logp * torch.from_numpy(c[:, : logp.shape[1]]).to(logp)).sum().backward()


def _deal(rows: list[Row], micro_tokens: int, ranks: int) -> tuple[list[list[Row]], list[list[list[Row]]]]:
    """Return passes of whole groups, about equal and as many on each rank, and the parts of larger groups."""
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.prompt)]
    areas = [len(group) * max(row.tokens for row in group) for group in groups]
    turns = -(-sum(areas) // (ranks * micro_tokens))
    budget = max(*areas, sum(areas) // (ranks * turns), 1)
    while budget < micro_tokens and sum(1 for _ in passes(rows, budget)) > ranks * turns:
        budget += budget // 8 + 1
    made = list(passes(rows, min(budget, micro_tokens)))
    return [parts[0] for parts in made if len(parts) == 1], [parts for parts in made if len(parts) > 1]


def _members(rows: list[Row]) -> list[int]:
    return [i for row in rows for i in row.rollouts]


def _sum(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor
