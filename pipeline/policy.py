"""A policy: a causal language model with its tokenizer, loaded from an ordinary Hugging Face checkpoint.

A door to ``transformers``, as is ``pipeline.pretrained``. Everything else sees a ``Policy`` and log-probabilities.

    logp_kt = log softmax(logits(prompt, x_k,<t) / T)[x_kt]             T = sampling temperature, float32
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pipeline.pretrained import add_adapter, found, hush, load_tokenizer, options
from pipeline.recompute import recompute_blocks


@dataclass(frozen=True)
class Policy:
    """A loaded policy.

    Attributes:
        model: causal language model, in evaluation mode; its trainable parameters define the gradient.
        tokenizer: its tokenizer.
        context: most tokens that it is used with; 0 for as many as it was made for.
    """

    model: Any
    tokenizer: Any
    context: int = 0

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.model.parameters()).device

    @property
    def pad_id(self) -> int:
        """Token that fills unused positions; it is masked everywhere."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    @property
    def context_length(self) -> int:
        """Most tokens that a prompt and its completion may have together."""
        made_for = int(getattr(self.model.config, "max_position_embeddings", self.tokenizer.model_max_length))
        return min(self.context or made_for, made_for)

    def trainable(self) -> dict[str, Tensor]:
        """Return the trainable parameters by name; tied parameters appear once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def load_policy(
    checkpoint: str | Path,
    *,
    adapter: Path | None = None,
    lora: dict[str, Any] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    attention: str = "sdpa",
    seed: int = 0,
    checkpointing: bool = False,
    context: int = 0,
    chat_template: str = "",
) -> Policy:
    """Load a checkpoint by folder or by hub name, with an adapter where one is given or asked for.

    Args:
        checkpoint: folder with config, safetensors and tokenizer, or the name of a model.
        adapter: folder of a saved LoRA adapter to go on from.
        lora: ``{"rank", "alpha", "targets"}`` of a new adapter; its A is drawn from ``seed``, its B is zero.
        dtype: torch dtype of the weights.
        device: torch device.
        attention: ``sdpa`` or ``eager``.
        seed: seed of a new adapter's A.
        checkpointing: keep one input a block, and compute the block again in the backward pass.
        context: most tokens that the policy is used with; 0 for as many as it was made for.
        chat_template: Jinja text that stands in for the tokenizer's own template; empty for that.

    Raises:
        FileNotFoundError: the checkpoint is neither a folder with a config nor a name the hub cache knows.
        ValueError: its weights are pickled, there is no adapter in its folder, or LoRA's targets name no layer.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(checkpoint, chat_template=chat_template)
    with found(checkpoint):
        model = AutoModelForCausalLM.from_pretrained(
            str(checkpoint),
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            use_safetensors=True,
            **options(),
        )
    if adapter is not None or lora is not None:
        model = add_adapter(model, adapter, lora, seed)
    loaded: Any = model
    loaded = loaded.to(device).eval()
    if checkpointing:
        recompute_blocks(loaded)
    return Policy(loaded, tokenizer, context)


def save_policy(policy: Policy, folder: Path) -> None:
    """Write the policy, or its adapter alone where it has one, as an ordinary checkpoint with its tokenizer."""
    hush()
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Batch:
    """Prompts and completions as one rectangle: prompts left-padded, completions right-padded.

    Attributes:
        input_ids: (rollouts, prompt tokens + completion tokens).
        attention_mask: 1 where a token is real.
        mask: True where a completion token is real; (rollouts, tokens).
    """

    input_ids: Int[Tensor, "rollouts length"]
    attention_mask: Int[Tensor, "rollouts length"]
    mask: Bool[Tensor, "rollouts tokens"]


def collate(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Batch:
    """Pad prompts on the left and completions on the right."""
    width, tokens = max(map(len, prompt_ids)), max(map(len, completion_ids), default=0)
    ids = torch.full((len(prompt_ids), width + tokens), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        start, end = width - len(prompt), width + len(completion)
        ids[row, start:width] = torch.as_tensor(prompt, dtype=torch.long)
        ids[row, width:end] = torch.as_tensor(completion, dtype=torch.long)
        attention[row, start:end] = 1
    return Batch(ids.to(device), attention.to(device), attention[:, width:].bool().to(device))


def positions(attention_mask: Int[Tensor, "rollouts length"]) -> Int[Tensor, "rollouts length"]:
    """Return each token's position, counted from its own row's first real token."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def token_logps(model: Any, batch: Batch, *, temperature: float = 1.0) -> Float[Tensor, "rollouts tokens"]:
    """Return the log-probability of each completion token, 0 where the mask is False, in float32."""
    tokens = batch.mask.shape[1]
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=positions(batch.attention_mask),
        logits_to_keep=tokens + 1,
        use_cache=False,
    ).logits[:, :-1]
    logp = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    taken = logp.gather(2, batch.input_ids[:, -tokens:, None]).squeeze(2)
    return torch.where(batch.mask, taken, torch.zeros_like(taken))


def convert_gguf(file: Path, folder: Path) -> None:
    """Unpack the weights of a GGUF file to float32 and save them, with the tokenizer, as an ordinary checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    hush()
    where, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of its own, which the library's switch does not reach
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    save_policy(Policy(model, tokenizer), folder)
