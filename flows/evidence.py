"""What steps read from the stores and hand to the maths: rollouts, beliefs, and what is not worth a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flows.desk import Desk
from pipeline.columns import places, spread, texts
from pipeline.records import REASONS, Prompts, Rollouts

if TYPE_CHECKING:
    from pipeline.staleness import Staleness
    from stores.latest import Latest


def roll(desk: Desk, policy: str, prompts: Prompts, *, rollouts: int, seed: int, step: int) -> Rollouts:
    """Sample and score one group a prompt from the policy of a key, or the one being trained from it."""
    return in_order(stream(desk, policy, prompts, rollouts=rollouts, seed=seed, step=step))


def stream(desk: Desk, policy: str, prompts: Prompts, *, rollouts: int, seed: int, step: int = 0) -> Iterator[Rollouts]:
    """Yield the scored group of one prompt after another, as the engine finishes them."""
    from pipeline.rollouts import collect as sample

    with desk.engines.of(policy, step) as generate:
        yield from sample(
            prompts,
            generate,
            desk.verifiers.score,
            desk.load(policy).tokenizer,
            rollouts=rollouts,
            sampling=desk.engines.sampling(),
            seed=seed,
            policy=policy,
            step=step,
            chat=desk.config.policy.chat,
        )


def in_order(groups: Iterable[Rollouts]) -> Rollouts:
    """Return groups as one, shortest prompts first: the order in which they end differs from run to run."""
    return Rollouts.concat(sorted(groups, key=lambda group: (len(group.prompt_ids[0]), group.prompt_uid[0])))


def latest_of(desk: Desk, rollouts: Sequence[str], uids: Sequence[str] | pa.Array) -> Latest:
    """Find the latest stored rollouts of some prompts, at most ``evidence.recent`` each; none is read yet."""
    from stores.latest import latest

    return latest(desk.store.trajectories, rollouts, uids, desk.config.evidence.recent)


def read_rollouts_of(desk: Desk, rollouts: Sequence[str], uids: Sequence[str]) -> Rollouts:
    """Return the latest stored rollouts of some prompts, at most ``evidence.recent`` each, oldest first."""
    return Rollouts.of(latest_of(desk, rollouts, uids).read(range(len(uids))))


def mean_target(desk: Desk, generations: Sequence[str], size: int) -> np.ndarray:
    """Return the mean gradient of a validation set of ``size`` prompts from the store."""
    from pipeline.influence import mean_gradient

    parts = [desk.store.gradients.read(key) for key in generations]
    return mean_gradient(
        np.concatenate([rows for _, rows, _ in parts]), np.concatenate([norms for _, _, norms in parts]), size=size
    )


def beliefs(
    desk: Desk, rollouts: Sequence[str], uids: Sequence[str] | pa.Array
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return alpha and beta of each prompt from the ledger of the given rollouts, and its (successes, failures)."""
    from pipeline.beliefs import from_visits

    settings, (visited, *counts) = desk.config.beliefs, desk.store.beliefs.columns(rollouts)
    row = places(visited, texts(uids))
    row, good, bad = (column[row >= 0] for column in (row, *counts))
    alpha, beta = from_visits(
        len(uids),
        row,
        good,
        bad,
        discount=settings.discount,
        prior=settings.prior,
        strength=settings.strength,
        informative=0 if desk.config.evidence.source == "first_stage" else 1,
    )
    totals = [np.bincount(row, weights=column, minlength=len(uids)).astype(np.int64) for column in (good, bad)]
    return alpha, beta, np.stack(totals)


@dataclass(frozen=True, eq=False)
class Cascade:
    """What the free filters left out.

    Attributes:
        reason: number of the reason of each prompt of the pool, see ``pipeline.curriculum.candidates``.
        tokens: stored completion tokens that would have gone through a backward pass, by reason.
        left: prompts that get a gradient, in the order of the pool.
        left_tokens: their stored completion tokens.
    """

    reason: np.ndarray
    tokens: dict[str, int]
    left: list[str]
    left_tokens: int

    @property
    def facts(self) -> dict[str, Any]:
        """What was saved, for the summary."""
        return {
            "prompts": {REASONS[code]: n for code, n in _counted(self.reason)},
            "tokens": dict(sorted(self.tokens.items())),
            "prompts_left": len(self.left),
            "tokens_left": self.left_tokens,
        }


def cascade(desk: Desk, data: str, rollouts: Sequence[str]) -> Cascade:
    """Return what is not worth a gradient, and why; costs no model call."""
    from pipeline.curriculum import NONE, candidates
    from pipeline.signal import Signals

    pool = desk.pool(data)
    found = Signals(len(pool))
    for prompt, part in latest_of(desk, rollouts, pool).scan(["reward", "completion_ids"]):
        found.add(prompt, part["reward"].to_numpy(), pc.list_value_length(part["completion_ids"]).to_numpy())
    alpha, beta, _ = beliefs(desk, rollouts, pool)
    share, weight = desk.config.select.candidates, desk.config.insight.weight
    reason = candidates(pool, alpha, beta, found.seen, found.signal, share=share, **weight)
    tokens = {code: int(found.tokens[found.seen & (reason == code)].sum()) for code, _ in _counted(reason[found.seen])}
    left = pool.filter(pa.array(reason == NONE)).to_pylist()
    refuse_images(desk, data, left)
    left_tokens = int(found.tokens[reason == NONE].sum())
    return Cascade(reason, {REASONS[code]: n for code, n in tokens.items()}, left, left_tokens)


def _counted(reason: np.ndarray) -> list[tuple[int, int]]:
    """Return the numbers of the reasons that are there, by name, and how often each is."""
    codes, counts = np.unique(reason[reason >= 0], return_counts=True)
    return sorted(zip(codes.tolist(), counts.tolist(), strict=True), key=lambda pair: REASONS[pair[0]])


def refuse_images(desk: Desk, data: str, uids: Sequence[str]) -> None:
    """Refuse prompts of the pool with images where the next step samples them or takes their gradients."""
    from pipeline.prompts import refuse_images as refuse

    found = []
    for table in desk.store.tables.scan(data, ["prompt_uid", "split", "messages"]):
        spoken = pc.and_(pc.equal(table["split"], "pool"), pc.match_substring(table["messages"], '"image"'))
        found.append(table.filter(spoken).select(["prompt_uid", "messages"]))
    suspects = pa.concat_tables(found)
    for place, row in sorted(
        zip(places(suspects["prompt_uid"], texts(uids)).tolist(), range(len(suspects)), strict=True)
    ):
        if place >= 0:
            refuse(suspects["messages"][row].as_py(), uids[place])


def write_staleness(desk: Desk, key: str, found: Sequence[tuple[Sequence[str], Staleness]]) -> None:
    """Store what is left of the evidence of each prompt at one policy, found in one or several passes."""
    names = ("rollouts", "effective", "ess", "log_ratio_max", "log_ratio_p99", "lost")
    columns: dict[str, Any] = {"prompt_uid": [uid for uids, _ in found for uid in uids]}
    columns |= {name: [v for _, part in found for v in getattr(part, name).tolist()] for name in names}
    desk.store.tables.write(key, "staleness", columns, {})


def staleness_key(desk: Desk, generation: str) -> str:
    """Return the key under which the staleness of a generation of gradients is kept."""
    return desk.store.key("staleness", generation=generation)


def read_staleness(desk: Desk, generations: Sequence[str], size: int, pool: pa.Array) -> dict[str, pa.Array]:
    """Return columns ``ess`` and ``log_ratio_p99`` of ``size`` rows, the pool first: None where neither was stored."""
    names, keys = ["ess", "log_ratio_p99"], [staleness_key(desk, generation) for generation in generations]
    none = {"prompt_uid": pa.array([], pa.string())} | dict.fromkeys(names, pa.array([], pa.float64()))
    found = [desk.store.tables.arrow(key, ["prompt_uid", *names]) for key in keys if desk.store.done(key)]
    table = pa.concat_tables([pa.table(none), *found]).combine_chunks()
    row = places(table["prompt_uid"], pool)
    return {name: spread(size, row[row >= 0], table[name].to_numpy()[row >= 0]) for name in names}
