"""A sketched gradient per prompt against plain training on the same tokens, and against what others do."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.features import projection_for, sketch_gradients
from pipeline.gradients import prompt_gradients
from pipeline.policy import Policy
from pipeline.records import Rollouts
from pipeline.weighted import plain
from tests.benchmarks import peers
from tests.benchmarks.measure import Row, installed, ratio
from tests.benchmarks.policies import SMOLLM2, TWO_LAYERS, arithmetic, learned, llama, random_rollouts, rollouts_of

SUBJECT, DIM, FEW, TOKENS, ITEMS = "capture", 8192, 1024, 128, 8


def measure(small: bool) -> Iterator[Row]:
    """Yield the large shape, the small shape beside the peers, and the embedded policy."""
    shape = {**SMOLLM2, "num_hidden_layers": 2} if small else SMOLLM2
    rollouts = random_rollouts(49152, 4, 32, 2, 48)
    yield Row(SUBJECT, "sketch every prompt's gradient / plain forward and backward, SmolLM2-135M's shape",
              _against_plain(llama(shape), rollouts, "grpo", pairs=1 if small else 5), bar="<= 1.15",
              note="4 prompts of 128 tokens, packed")  # fmt: skip
    yield from _two_layers(2 if small else 20, 8 if small else 32)
    policy, rollouts = learned(), arithmetic(60, 2)
    yield Row(SUBJECT, "sketch every prompt's gradient / plain forward and backward, embedded policy",
              _against_plain(policy, rollouts, "grpo"), note=f"{len(rollouts.groups())} prompts x 8, packed")  # fmt: skip
    yield Row(SUBJECT, "a gradient per prompt, not sketched / plain, embedded policy", ratio(
              lambda: prompt_gradients(policy, rollouts, "grpo", lambda *part, **rows: None),
              lambda: _train(policy, rollouts, "grpo")))  # fmt: skip


def _two_layers(steps: int, items: int) -> Iterator[Row]:
    """Compare with the peers: one batch of 8 sequences, and the errors of the cosines of more of them."""
    policy = llama(TWO_LAYERS, attention="eager")
    ids = texts(items + ITEMS * steps)
    _fit(policy, ids[items:], steps)
    batch, ids = ids[:ITEMS], ids[:items]
    rollouts = one_each(batch)
    exact = _exact(policy, one_each(ids))
    floor = plain_step(policy, batch)
    where = f"{ITEMS} x {TOKENS} tokens, 7.7 M parameters"
    factored = projection_for(policy, FEW, kind="factored")  # already errs less than the peer that it is held against
    spaces = {"sparse": projection_for(policy, DIM), "factored": projection_for(policy, DIM, kind="factored")}
    for name, projection in {**spaces, "factored, few numbers": factored}.items():
        value = ratio(lambda p=projection: sketch_gradients(policy, rollouts, "rft", p), floor)
        rows = torch.from_numpy(sketch_gradients(policy, one_each(ids), "rft", projection)[1])
        yield Row(SUBJECT, f"ours, {name} / plain, {where}", value, note=_error(rows, exact))
    yield Row(
        SUBJECT,
        f"vmap of torch.func / plain, {where}",
        ratio(peers.vmap(policy, batch), floor),
        note="exact, kept whole",
    )
    value = ratio(peers.opacus(policy, batch), floor) if installed("opacus") else None
    yield Row(SUBJECT, f"opacus GradSampleModule / plain, {where}", value, note="exact, kept whole")
    value, ours = None, None
    if installed("bergson"):
        collect = peers.bergson(policy, batch)
        value, note = ratio(collect, floor), _error(peers.bergson(policy, ids)(), exact)
        ours = ratio(lambda: sketch_gradients(policy, rollouts, "rft", factored), collect)
    yield Row(SUBJECT, f"bergson, p = 16 a module, weights frozen / plain, {where}", value, note=note if value else "")
    yield Row(SUBJECT, "ours, factored, few numbers / bergson", ours, bar="<= 1")


def texts(count: int) -> Tensor:
    """Return sequences of bytes of this repository's own source, (count, 128)."""
    from pathlib import Path

    source = b"".join(path.read_bytes() for path in sorted(Path("pipeline").rglob("*.py")))
    return torch.tensor(list(source[: count * TOKENS])).view(count, TOKENS)


def one_each(ids: Tensor) -> Rollouts:
    """Return each sequence as the one rewarded completion of its first token."""
    return rollouts_of([[row[0]] for row in ids.tolist()], [[row[1:]] for row in ids.tolist()])


def plain_step(policy: Policy, ids: Tensor) -> Callable[[], object]:
    """Return an ordinary batched forward and backward pass."""

    def step() -> None:
        loss(policy, ids).backward()
        policy.model.zero_grad()

    return step


def loss(policy: Policy, ids: Tensor) -> Tensor:
    """Return the summed mean cross-entropy of each sequence."""
    logits = policy.model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / (TOKENS - 1)


def _fit(policy: Policy, ids: Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=1e-3)
    for batch in ids.split(ITEMS)[:steps]:
        loss(policy, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def _exact(policy: Policy, rollouts: Rollouts) -> Tensor:
    """Return the cosines of the whole gradients, by a backward pass each."""
    rows = []
    for index in rollouts.groups().values():
        plain(policy, rollouts.take(index), "rft", micro_tokens=1 << 16)
        rows.append(torch.cat([p.grad.flatten().clone() for p in policy.trainable().values()]))
        policy.model.zero_grad()
    return _cosines(torch.stack(rows))


def _cosines(rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    return (unit @ unit.T)[tuple(np.triu_indices(len(rows), 1))]


def _error(rows: Tensor, exact: Tensor) -> str:
    rmse = float((_cosines(rows) - exact).square().mean().sqrt())
    return f"RMSE of cosines {rmse:.4f} at {rows.shape[1]:,} numbers; the exact ones spread by {float(exact.std()):.3f}"


def _against_plain(policy: Policy, rollouts: Rollouts, objective: str, pairs: int = 5) -> float:
    projection = projection_for(policy, DIM)
    return ratio(
        lambda: sketch_gradients(policy, rollouts, objective, projection),
        lambda: _train(policy, rollouts, objective),
        pairs,
    )


def _train(policy: Policy, rollouts: Rollouts, objective: str) -> None:
    plain(policy, rollouts, objective, micro_tokens=1 << 16)
    policy.model.zero_grad()
