"""A policy that no accelerator holds whole: its weights are shared by the processes of a group (FSDP).

``fully_shard`` (Zhao et al., arXiv:2304.11277, in its second version) keeps 1 / ranks of every matrix on each rank, and
brings a decoder block together while it computes; embeddings and head are together from their first use in a pass to
its end.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipeline.policy import Policy, load_policy
from pipeline.pretrained import load_tokenizer, skeleton
from pipeline.recompute import recompute_blocks
from pipeline.scope import blocks_of

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
        A policy whose parameters are distributed tensors, for ``pipeline.sharded.sketch_gradients``.

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
