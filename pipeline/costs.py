r"""What rollouts, gradients and updates cost in tokens, operations, bytes and seconds: formulas, and nothing else.

    forward   2 M + 4 L h c              operations a token        M  parameters that are multiplied (Kaplan et al.,
    backward  2 (2 M + 4 L h c)                                       arXiv:2001.08361, table 1), L layers, h width,
              half of it where the weights do not train               c tokens attended to: two products of h c each
    recompute one more forward                                        (Chen et al., arXiv:1604.06174)
    cache     2 L h_kv                   numbers a token           h_kv  width of the keys
    activations  17 L h, and 2.5 L a c where attention scores are kept        numbers a token, a heads
              (Korthikanti et al., arXiv:2205.05198, equation 2: 34 and 5 bytes at two bytes a number)

Sampling reads all weights once a token: that, and the calls of many small operations, is what it costs beyond its
operations. Seconds are sums, without overlap; lengths are those expected; memory is that of the fullest moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

CALLS = 140  # small calls that a Llama layer's forward pass in Transformers takes as long as, as measured
STEP_CALLS = 300  # the same of a step of generation besides its layers
SKETCH = 1.9  # times reading a gradient once, as the benchmarks measure
TABLE = 1 << 18  # bytes of a prompt in flight in the first stage of a sketch
LOGITS = 3  # copies of the logits in float32: themselves, their logarithms, their gradient
DRAWN = 8  # of the logits of the tokens being drawn: two of them in float64
TOKEN_BYTES = 6.0  # of a stored token: its id and its log-probability, compressed
ROLLOUT_BYTES = 40.0  # of a stored rollout besides its tokens
OPTIMIZER_READS = 7  # numbers that AdamW reads or writes a parameter


@dataclass(frozen=True)
class Shape:
    """A policy by its numbers.

    Attributes:
        parameters: all of them, tied ones once.
        trainable: those that train.
        multiplied: those that a token is multiplied with: all but an embedding that is only looked up.
        layers: transformer blocks.
        hidden: width.
        heads: attention heads.
        kv_width: width of keys, and of values.
        vocabulary: width of the logits.
        itemsize: bytes a number.
        eager: attention scores are kept for the backward pass.
        recompute: each block is computed again in the backward pass.
    """

    parameters: int
    trainable: int
    multiplied: int
    layers: int
    hidden: int
    heads: int
    kv_width: int
    vocabulary: int
    itemsize: int
    eager: bool = False
    recompute: bool = False


@dataclass(frozen=True)
class Rate:
    """A device by its numbers: operations a second, bytes a second, seconds of a small call; ``source`` says whence."""

    flops: float
    bandwidth: float
    call: float
    source: str


@dataclass(frozen=True)
class Cost:
    """Rollouts, tokens sampled and tokens computed, bytes on disk, bytes of memory at once, and seconds."""

    rollouts: int = 0
    sampled: int = 0
    computed: int = 0
    disk: float = 0.0
    memory: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Return what both cost, one after the other."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Cost(**{name: max(a, b) if name == "memory" else a + b for name, (a, b) in pairs.items()})

    def times(self, n: float) -> Cost:
        """Return what it costs ``n`` times, one after the other."""
        kinds: dict[str, Any] = {name: getattr(self, name) for name in ("rollouts", "sampled", "computed")}
        whole = {name: round(n * value) for name, value in kinds.items()}
        return Cost(**whole, disk=n * self.disk, memory=self.memory, seconds=n * self.seconds)


def shape_of(model: Any, *, eager: bool = False, recompute: bool = False) -> Shape:
    """Return the shape of a model, which may be without weights, from its parameters and its configuration."""
    config, parameters = model.config, list(model.parameters())
    looked_up, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    whole = sum(p.numel() for p in parameters)
    tied = head is None or head.weight is looked_up
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return Shape(
        parameters=whole,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        multiplied=whole - (0 if tied else looked_up.numel()),
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        heads=heads,
        kv_width=int(getattr(config, "num_key_value_heads", None) or heads) * width,
        vocabulary=int(config.vocab_size),
        itemsize=int(max(parameters, key=lambda p: p.numel()).element_size()),
        eager=eager,
        recompute=recompute,
    )


def generation(
    shape: Shape, rate: Rate, *, prompts: int, prompt_tokens: float, rollouts: int, new_tokens: float, batch_tokens: int
) -> Cost:
    """Return the cost of ``rollouts`` completions a prompt; a prompt is computed once for all of them.

    Example:
        >>> shape = Shape(100, 100, 100, 1, 4, 1, 4, 10, 4)
        >>> cost = generation(shape, Rate(1.0, 1e30, 0.0, ""), prompts=2, prompt_tokens=3, rollouts=5, new_tokens=7,
        ...                   batch_tokens=100)
        >>> cost.rollouts, cost.sampled, cost.computed
        (10, 70, 76)
    """
    count, length = prompts * rollouts, prompt_tokens + new_tokens
    asked, said = prompts * prompt_tokens, count * new_tokens
    operations = asked * _forward(shape, prompt_tokens / 2) + said * _forward(shape, prompt_tokens + new_tokens / 2)
    rows = max(rollouts, min(count, batch_tokens // max(1.0, length)))
    steps = math.ceil(count / max(1, rows)) * new_tokens
    reading = shape.parameters * shape.itemsize / rate.bandwidth + (shape.layers * CALLS + STEP_CALLS) * rate.call
    memory = static_bytes(shape)
    memory += rows * (length * 2 * shape.layers * shape.kv_width * shape.itemsize + DRAWN * 4 * shape.vocabulary)
    return Cost(
        rollouts=count,
        sampled=round(said),
        computed=round(asked + said),
        disk=count * ROLLOUT_BYTES + said * TOKEN_BYTES,
        memory=memory,
        seconds=operations / rate.flops + steps * reading,
    )


def gradients(
    shape: Shape,
    rate: Rate,
    *,
    prompts: int,
    prompt_tokens: float,
    rollouts: float,
    new_tokens: float,
    micro_tokens: int,
) -> Cost:
    """Return the cost of one projected gradient a prompt, or, without the projection, of a backward pass over them."""
    tokens = prompts * (prompt_tokens + rollouts * new_tokens)  # packed: a prompt once for its completions
    context = prompt_tokens + new_tokens / 2
    passes = math.ceil(tokens / micro_tokens) * (4 if shape.recompute else 3)
    seconds = tokens * _both_ways(shape, context) / rate.flops + passes * shape.layers * CALLS * rate.call
    at_once = min(tokens, micro_tokens)
    in_flight = max(1.0, at_once / max(1.0, prompt_tokens + rollouts * new_tokens))
    return Cost(
        computed=round(tokens),
        memory=static_bytes(shape) + at_once * token_bytes(shape, context) + in_flight * TABLE,
        seconds=seconds + prompts * SKETCH * 4 * shape.trainable / rate.bandwidth,
    )


def update(
    shape: Shape, rate: Rate, *, prompts: int, prompt_tokens: float, rollouts: int, new_tokens: float, micro_tokens: int
) -> Cost:
    """Return the cost of one optimizer step: a backward pass over a batch, and AdamW."""
    batch = gradients(
        shape,
        rate,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        rollouts=rollouts,
        new_tokens=new_tokens,
        micro_tokens=micro_tokens,
    )
    moved = shape.trainable * shape.itemsize
    seconds = batch.seconds - prompts * SKETCH * 4 * shape.trainable / rate.bandwidth  # nothing is projected
    return Cost(
        computed=batch.computed,
        memory=batch.memory + 3 * moved,  # its gradient and two moments
        seconds=seconds + OPTIMIZER_READS * moved / rate.bandwidth,
    )


def checkpoint_bytes(shape: Shape) -> float:
    """Return the bytes of a stored checkpoint: what trains, and its two moments."""
    return 3.0 * shape.trainable * shape.itemsize


def static_bytes(shape: Shape) -> float:
    """Return the bytes of the weights."""
    return float(shape.parameters * shape.itemsize)


def engine_bytes(shape: Shape, cache: float, share: int) -> float:
    """Return the bytes of an engine beside the policy: merged weights, ``share`` holding them together, and a cache."""
    adapter = shape.trainable if shape.trainable < shape.parameters else 0
    head = shape.vocabulary * shape.hidden if shape.multiplied == shape.parameters else 0  # a copy where it is tied
    return (shape.parameters - adapter + head) * shape.itemsize / share + cache


def token_bytes(shape: Shape, context: float) -> float:
    """Return the bytes that a token of a backward pass holds: activations and logits."""
    layer = 17.0 * shape.hidden + (2.5 * shape.heads * context if shape.eager else 0.0)
    kept = layer + shape.layers * shape.hidden if shape.recompute else shape.layers * layer
    return kept * shape.itemsize + LOGITS * 4.0 * shape.vocabulary


def budgets(shape: Shape, memory: float, *, prompt_tokens: float, new_tokens: float) -> tuple[int, int]:
    """Return the tokens of generation and of a backward pass that fit into ``memory`` bytes, training included.

    Raises:
        ValueError: not even one prompt with its completion fits.
    """
    length = prompt_tokens + new_tokens
    cache = 2.0 * shape.layers * shape.kv_width * shape.itemsize + DRAWN * 4.0 * shape.vocabulary / length
    training = static_bytes(shape) + 3.0 * shape.trainable * shape.itemsize + TABLE
    batch = int((memory - training) / cache)  # the optimizer stays while rollouts are made
    micro = int((memory - training) / token_bytes(shape, length))
    if min(batch, micro) < length:
        raise ValueError(
            f"policy.memory_gib = {memory / 2**30:.1f} is too little: weights, gradient and moments take "
            f"{training / 2**30:.1f} GiB, and of the {length:.0f} tokens of a prompt with its completion "
            f"{max(0, min(batch, micro))} fit beside them; use LoRA, a half-precision dtype, "
            "policy.checkpointing = true or more memory"
        )
    return batch, micro


def _forward(shape: Shape, context: float) -> float:
    return 2.0 * shape.multiplied + 4.0 * shape.layers * shape.hidden * context


def _both_ways(shape: Shape, context: float) -> float:
    forward = _forward(shape, context)
    backward = forward * (1 + min(1.0, shape.trainable / shape.multiplied))  # inputs always, weights where they train
    return forward + backward + (forward if shape.recompute else 0.0)
