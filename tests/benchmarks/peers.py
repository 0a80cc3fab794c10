"""Gradients of single samples as others make them, on the same model and tokens; each returns what is to be timed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.policy import Policy


def vmap(policy: Policy, ids: Tensor) -> Callable[[], object]:
    """Per-sample gradients with torch.func, all of them held."""
    from torch.func import functional_call, grad
    from torch.func import vmap as mapped

    parameters = {name: p.detach() for name, p in policy.model.named_parameters()}
    tokens = ids.shape[1]
    causal = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)[None, None]
    positions = torch.arange(tokens)[None]

    def one(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        given = {"attention_mask": causal, "position_ids": positions, "use_cache": False}
        logits = functional_call(policy.model, weights, (row[None],), given).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, row[1:])

    per_sample = mapped(grad(one), in_dims=(None, 0))
    return lambda: per_sample(parameters, ids)


def opacus(policy: Policy, ids: Tensor) -> Callable[[], object]:
    """Per-sample gradients with opacus, all of them held."""
    from opacus.grad_sample import GradSampleModule

    model = GradSampleModule(copy.deepcopy(policy.model).train())

    def step() -> None:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
        losses.sum().backward()
        model.zero_grad(set_to_none=True)

    return step


def bergson(policy: Policy, ids: Tensor) -> Callable[[], Tensor]:
    """Gradients of each linear layer projected from both sides to 16 x 16, the weights frozen; returns the rows."""
    from bergson.collector.collector import HookCollectorBase
    from bergson.gradients import GradientProcessor

    class Rows(HookCollectorBase):
        """Keeps what the hooks make, without an index on disk."""

        def setup(self) -> None:
            pass

        def teardown(self) -> None:
            pass

        def backward_hook(self, module: torch.nn.Module, g: Tensor) -> None:
            self.mod_grads[module._name] = self._compute_gradient(module, g)

        def process_batch(self, indices: list[int], **_: object) -> None:
            pass

    model = copy.deepcopy(policy.model).requires_grad_(False)
    model.enable_input_require_grads()
    collector = Rows(model=model, processor=GradientProcessor(projection_dim=16))

    def collect() -> Tensor:
        collector.mod_grads.clear()
        with collector.with_batch(torch.ones(ids.shape, dtype=torch.bool)):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
            losses.sum().backward()
        return torch.cat([collector.mod_grads[name] for name in sorted(collector.mod_grads)], dim=1)

    return collect
