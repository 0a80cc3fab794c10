"""What a checkpoint is before it is a policy: its tokenizer, its configuration, where its weights are, its adapter.

A door to ``transformers``, and the one to ``peft``. Weights are read from safetensors and from nothing else: a pickle
runs whatever its author put there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Names of weights that only a pickle reader opens."""

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def load_tokenizer(checkpoint: str | Path, *, chat_template: str = "", gguf: str = "") -> Any:
    """Load the tokenizer of a checkpoint, without its weights; arguments and errors as in ``load_policy``.

    ``gguf`` names a file in the checkpoint's folder that holds the tokenizer in the place of all others.
    """
    from transformers import AutoTokenizer

    if not gguf:
        refuse_unusable(Path(checkpoint))
    with found(checkpoint):
        tokenizer = AutoTokenizer.from_pretrained(str(checkpoint), padding_side="left", **options(gguf))
    if chat_template:
        from jinja2 import TemplateError

        tokenizer.chat_template = chat_template
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        except TemplateError as error:
            raise ValueError(
                f"chat_template = {chat_template[:80]!r}... does not render a user message: {error}; give the Jinja "
                "text of a chat template, or the file that holds it"
            ) from error
    return tokenizer


def skeleton(
    checkpoint: str | Path,
    *,
    adapter: Path | None = None,
    lora: dict[str, Any] | None = None,
    dtype: str = "float32",
    attention: str = "sdpa",
    gguf: str = "",
) -> Any:
    """Return the model of a checkpoint without its weights, on the device ``meta``, from its configuration alone.

    It has the layers of the adapter that is given or asked for. ``gguf`` names a file in the checkpoint's folder that
    holds the configuration.

    Raises:
        FileNotFoundError: the checkpoint is neither a folder with a config nor a name the hub cache knows.
        ValueError: its weights are pickled, there is no adapter in its folder, or LoRA's targets name no layer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not gguf:
        refuse_unusable(Path(checkpoint))
    with found(checkpoint):
        config = AutoConfig.from_pretrained(str(checkpoint), **options(gguf))
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention
        )
        if adapter is not None:
            return _hollow_adapter(model, adapter)
        return add_adapter(model, None, lora, 0) if lora is not None else model


def options(gguf: str = "") -> dict[str, Any]:
    """Return what every call of the library is told; its own progress bars are off from then on."""
    hush()
    return {"local_files_only": os.environ.get("HF_HUB_OFFLINE") == "1"} | ({"gguf_file": gguf} if gguf else {})


def cached_revision(name: str) -> str:
    """Return the commit of the snapshot that the local hub cache has of a model; empty where it has none."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        return extract_commit_hash(cached_file(name, "config.json", local_files_only=True), None) or ""
    except OSError:
        return ""


def refuse_unusable(folder: Path) -> None:
    """Refuse a folder that is no checkpoint, and one whose weights are pickled: loading those runs what is in them."""
    if not folder.exists():
        return
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"checkpoint {str(folder)!r} has no config.json: not a Hugging Face checkpoint")
    pickled = sorted(p.name for kind in PICKLED for p in folder.glob(kind))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"checkpoint {str(folder)!r} has its weights in {pickled[0]!r} only: a pickle runs code when it is read, "
            "so it is not; convert it on a machine of its author, or download the safetensors of the model"
        )


@contextlib.contextmanager
def found(checkpoint: str | Path) -> Iterator[None]:
    """Say what is missing where the library does not find a checkpoint, or finds pickled weights."""
    try:
        yield
    except OSError as error:
        if "safetensors" in str(error):
            raise ValueError(
                f"checkpoint {str(checkpoint)!r} has no weights in safetensors, and pickled ones are not read: they "
                "run code; choose a revision or a model with model.safetensors"
            ) from error
        raise FileNotFoundError(
            f"checkpoint {str(checkpoint)!r} is not there: give the folder of a Hugging Face checkpoint, or a model "
            "name that the hub (or its local cache, when HF_HUB_OFFLINE=1) has"
        ) from error


def hush() -> None:
    """Leave progress to the caller: the library's own bars would cut through it."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def add_adapter(model: Any, adapter: Path | None, lora: dict[str, Any] | None, seed: int) -> Any:
    """Return the model with the adapter of a folder, or with a new one; arguments and errors as in ``load_policy``."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter is not None:
        _refuse_unusable_adapter(adapter)
        return PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    assert lora is not None
    torch.manual_seed(seed)  # peft draws A from the global generator
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        target_modules=lora["targets"],
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # peft's own error for targets that match no layer
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        raise ValueError(
            f"lora.targets = {lora['targets']!r} names no layer of this model; its linear layers are {sorted(linear)}"
        ) from error


def _hollow_adapter(model: Any, adapter: Path) -> Any:
    """Return the model with the layers of a saved adapter, but none of its weights."""
    from peft import PeftConfig, get_peft_model

    _refuse_unusable_adapter(adapter)
    config = PeftConfig.from_pretrained(str(adapter))
    config.inference_mode = False  # it is saved as one that does not train
    return get_peft_model(model, config)


def _refuse_unusable_adapter(adapter: Path) -> None:
    for name, remedy in (
        ("adapter_config.json", "give the folder of a saved adapter"),
        ("adapter_model.safetensors", "pickled weights are not read"),
    ):
        if not (adapter / name).is_file():
            raise ValueError(f"adapter = {str(adapter)!r} holds no {name}; {remedy}")
