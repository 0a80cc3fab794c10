"""A policy as another engine reads it: one full checkpoint, its adapter merged and its embeddings untied.

    W = W_0 + (alpha / r) B A                                        per adapted layer; the policy itself stays as it is

In bfloat16 the sum is rounded to W_0's eight bits, which takes most of a small difference away.

The output layer is written out even where it shares its weights with the embeddings, and the config says so: an engine
that packs weights for its own kernels may keep the old packed output layer when it is given new shared ones.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.policy import Policy


@torch.no_grad()
def merged_weights(policy: Policy) -> dict[str, Tensor]:
    """Return every weight of the policy by its name in a plain checkpoint, with its adapter added, on the CPU.

    Raises:
        ValueError: more than one adapter is active, or an adapted layer has no dense difference to add.
    """
    model = _base(policy.model)
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "base_layer")}
    weights = {}
    for name, tensor in model.state_dict().items():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in name:
            continue
        layer, _, kind = plain.rpartition(".")
        if layer in adapted and kind == "weight":
            tensor = tensor + _delta(layer, adapted[layer]).to(tensor)  # one difference at a time on the device
        weights[plain] = tensor.detach().to("cpu", copy=True).contiguous()  # shared storages cannot be saved
    return weights


def write_merged(policy: Policy, folder: Path) -> None:
    """Write the policy as an ordinary full checkpoint that any engine loads, with its tokenizer.

    Raises:
        ValueError: as ``merged_weights``.
    """
    from safetensors.torch import save_file

    save_file(merged_weights(policy), folder / "model.safetensors", metadata={"format": "pt"})
    merged_config(policy).save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def merged_config(policy: Policy) -> Any:
    """Return the config that goes with ``merged_weights``."""
    model = _base(policy.model)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.tie_word_embeddings = False
    return config


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _delta(name: str, module: Any) -> Tensor:
    active = list(module.active_adapters)
    if len(active) != 1 or not hasattr(module, "get_delta_weight"):
        raise ValueError(
            f"layer {name} has the adapters {active} on a {type(module).__name__}: one LoRA adapter can be merged for "
            "another engine; train such a policy with generation.engine = 'transformers'"
        )
    return module.get_delta_weight(active[0])
