r"""Features of a policy that no accelerator holds whole: its weights are shared by the processes of a group (FSDP).

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

from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.capture import Layer, capture
from pipeline.features import Projection, refuse_infinite, sketcher
from pipeline.gradients import Handler, Watch, coefficients
from pipeline.packing import Row, pack, packed_logps, passes
from pipeline.policy import Policy, load_policy
from pipeline.pretrained import load_tokenizer, skeleton
from pipeline.recompute import recompute_blocks
from pipeline.records import Rollouts
from pipeline.scope import Scope, blocks_of, everything, only

PATIENCE = timedelta(hours=1)
"""For how long a rank waits for the others: the first reads the whole policy from disk meanwhile."""


def join_group(device: str, rank: int, ranks: int, *, local: int = 0, meet: str = "env://") -> str:
    """Join a group of processes that share the weights of policies, and return this process's device.

    Args:
        device: ``cuda``, over NCCL, or ``cpu``, over Gloo.
        rank: number of this process in the group.
        ranks: size of the group.
        local: number of this process on its machine, and of its accelerator.
        meet: where the processes find each other, as ``torch.distributed`` takes it: ``file:///path``, or the address
            that ``torchrun`` leaves in the environment.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, init_method=meet, rank=rank, world_size=ranks, timeout=PATIENCE)
    return device


def leave_group() -> None:
    """Leave the group, when all have done their work."""
    dist.destroy_process_group()


def load_sharded(
    checkpoint: str | Path,
    *,
    device: str,
    adapter: Path | None = None,
    lora: dict[str, Any] | None = None,
    dtype: str = "float32",
    attention: str = "sdpa",
    seed: int = 0,
    checkpointing: bool = False,
    context: int = 0,
    chat_template: str = "",
) -> Policy:
    """Load a checkpoint whose weights all ranks of the process group share; every rank calls this.

    Rank 0 reads the weights, into its machine's memory; no other rank does, and a rank's device holds its own part and,
    for a moment, one whole parameter. Arguments and errors are those of ``load_policy``.

    Returns:
        A policy whose parameters are distributed tensors, for ``sketch_gradients`` of this module.

    Raises:
        ValueError: the model has no list of blocks to share out.
    """
    options: dict[str, Any] = {"adapter": adapter, "lora": lora, "dtype": dtype, "attention": attention}
    model = skeleton(checkpoint, **options).eval()
    blocks = blocks_of(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no list of blocks to share between processes; use one process")
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh)
    _materialize(model, device)
    source = load_policy(checkpoint, **options, seed=seed).model if dist.get_rank() == 0 else None
    _share(model, source, device)
    if checkpointing:
        recompute_blocks(model)
    return Policy(model, load_tokenizer(checkpoint, chat_template=chat_template), context)


def _materialize(model: nn.Module, device: str) -> None:
    """Give parameters and buffers memory, and keep tied parameters one."""
    names = {id(p): name for name, p in model.named_parameters()}
    uses = [(m, key, names[id(p)]) for m in model.modules() for key, p in m.named_parameters(recurse=False)]
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    model.to_empty(device=device)
    made: dict[str, nn.Parameter] = {}
    for module, key, name in uses:
        made.setdefault(name, getattr(module, key)).requires_grad_(trains[name])
        setattr(module, key, made[name])


@torch.no_grad()
def _share(model: nn.Module, source: nn.Module | None, device: str) -> None:
    """Send each rank its part of every parameter, and every buffer, from rank 0, which has them in ``source``."""
    weights, buffers = (dict(source.named_parameters()), dict(source.named_buffers())) if source else ({}, {})
    for name, mine in model.named_parameters():
        assert isinstance(mine, DTensor)
        whole = weights[name].to(device) if source else torch.empty(mine.shape, dtype=mine.dtype, device=device)
        mine.to_local().copy_(distribute_tensor(whole, mine.device_mesh, mine.placements).to_local())
    for name, buffer in model.named_buffers():
        if source:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)


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
        policy: from ``load_sharded``.
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
    made = list(passes(rows, min(micro_tokens, max(areas) + sum(areas) // (ranks * turns))))
    return [parts[0] for parts in made if len(parts) == 1], [parts for parts in made if len(parts) > 1]


def _members(rows: list[Row]) -> list[int]:
    return [i for row in rows for i in row.rollouts]


def _sum(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor
