"""What steps read from the stores and hand to the maths, and the one place where a selection is written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.desk import Desk
from pipeline.records import Prompts, Rollouts

if TYPE_CHECKING:
    from pipeline.staleness import Staleness


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


def read_rollouts_of(desk: Desk, rollouts: Sequence[str], uids: Sequence[str]) -> Rollouts:
    """Return the latest stored rollouts of some prompts, at most ``evidence.recent`` each, oldest first."""
    stored = Rollouts.of(desk.store.trajectories.read(rollouts))
    groups = stored.groups()
    return stored.take([i for uid in uids for i in groups.get(uid, [])[-desk.config.evidence.recent :]])


def mean_target(desk: Desk, generations: Sequence[str], size: int) -> np.ndarray:
    """Return the mean gradient of a validation set of ``size`` prompts from the store."""
    from pipeline.influence import mean_gradient

    parts = [desk.store.gradients.read(key) for key in generations]
    return mean_gradient(
        np.concatenate([rows for _, rows, _ in parts]), np.concatenate([norms for _, _, norms in parts]), size=size
    )


def targets_of(table: Mapping[str, Any]) -> list[str]:
    """Return the columns of a table of scores or of a selection that hold an alignment with a validation set."""
    return [name for name in table if name.startswith(("cosine_", "dot_"))]


def beliefs(
    desk: Desk, rollouts: Sequence[str], uids: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, dict[str, list[tuple[int, int]]]]:
    """Return alpha and beta of each prompt from the ledger of the given rollouts, and the ledger itself."""
    from pipeline.beliefs import from_history

    settings, history = desk.config.beliefs, desk.store.beliefs.history(rollouts)
    informative = 0 if desk.config.evidence.source == "first_stage" else 1
    alpha, beta = from_history(
        uids,
        history,
        discount=settings.discount,
        prior=settings.prior,
        strength=settings.strength,
        informative=informative,
    )
    return alpha, beta, history


@dataclass(frozen=True)
class Cascade:
    """What the free filters left out.

    Attributes:
        reason: of each prompt that gets no gradient.
        tokens: stored completion tokens that would have gone through a backward pass, by reason.
        left: prompts that get a gradient, in the order of the pool.
        left_tokens: their stored completion tokens.
    """

    reason: dict[str, str]
    tokens: dict[str, int]
    left: list[str]
    left_tokens: int

    @property
    def facts(self) -> dict[str, Any]:
        """What was saved, for the summary."""
        return {
            "prompts": dict(sorted(Counter(self.reason.values()).items())),
            "tokens": dict(sorted(self.tokens.items())),
            "prompts_left": len(self.left),
            "tokens_left": self.left_tokens,
        }


def cascade(desk: Desk, data: str, rollouts: Sequence[str]) -> Cascade:
    """Return what is not worth a gradient, and why; costs no model call."""
    from pipeline.advantages import has_signal
    from pipeline.curriculum import candidates

    uids = desk.prompts(data, "pool").prompt_uid
    stored = read_rollouts_of(desk, rollouts, uids)
    signal = {uid: has_signal(np.array([stored.reward[i] for i in rows])) for uid, rows in stored.groups().items()}
    alpha, beta, _ = beliefs(desk, rollouts, uids)
    reason = candidates(uids, alpha, beta, signal, share=desk.config.select.candidates, **desk.config.insight.weight)
    tokens: Counter[str] = Counter()
    for uid, completion in zip(stored.prompt_uid, stored.completion_ids, strict=True):
        tokens[reason.get(uid, "")] += len(completion)
    left_tokens, left = tokens.pop("", 0), [uid for uid in uids if uid not in reason]
    refuse_images(desk, data, left)
    return Cascade(reason, dict(tokens), left, left_tokens)


def refuse_images(desk: Desk, data: str, uids: Sequence[str]) -> None:
    """Refuse prompts of the pool with images where the next step samples them or takes their gradients."""
    from pipeline.prompts import refuse_images as refuse

    pool = desk.prompts(data, "pool")
    for row in pool.rows_of(uids):
        refuse(pool.messages[row], pool.prompt_uid[row])


def write_staleness(desk: Desk, key: str, found: Sequence[tuple[Sequence[str], Staleness]]) -> None:
    """Store what is left of the evidence of each prompt at one policy, found in one or several passes."""
    names = ("rollouts", "effective", "ess", "log_ratio_max", "log_ratio_p99", "lost")
    columns: dict[str, Any] = {"prompt_uid": [uid for uids, _ in found for uid in uids]}
    columns |= {name: [v for _, part in found for v in getattr(part, name).tolist()] for name in names}
    desk.store.tables.write(key, "staleness", columns, {})


def staleness_key(desk: Desk, generation: str) -> str:
    """Return the key under which the staleness of a generation of gradients is kept."""
    return desk.store.key("staleness", generation=generation)


def read_staleness(desk: Desk, generations: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return ``ess`` and ``log_ratio_p99`` by prompt_uid, of the generations that have them beside them."""
    out: dict[str, dict[str, float]] = {"ess": {}, "log_ratio_p99": {}}
    for key in (staleness_key(desk, generation) for generation in generations):
        if desk.store.done(key):
            table = desk.store.tables.read(key)
            for name, column in out.items():
                column.update(zip(table["prompt_uid"], table[name], strict=True))
    return out


def chosen(desk: Desk, selection: str) -> list[str]:
    """Return the prompt_uids of a stage, best first."""
    table = desk.store.curricula.read(selection)
    return [
        u for _, u in sorted((r, u) for r, u in zip(table["rank"], table["prompt_uid"], strict=True) if r is not None)
    ]


def write_selection(
    desk: Desk,
    key: str,
    data: str,
    rollouts: Sequence[str],
    chosen: Any,
    stage: int,
    measured: Mapping[str, Mapping[str, float]],
) -> None:
    """Store a stage with all that is known of each prompt of the pool at the moment of selection.

    ``measured`` holds further columns by prompt_uid: the cosines, and how stale the evidence is.
    """
    from pipeline.selectors import insight

    out = desk.excluded(data)
    uids = [*desk.prompts(data, "pool").prompt_uid, *out]
    alpha, beta, history = beliefs(desk, rollouts, uids)
    value = insight.score(alpha, beta, rollouts=desk.config.train.rollouts, **desk.config.insight.weight)
    rank = {uid: i for i, uid in enumerate(chosen.chosen)}
    drawn = dict(zip(chosen.chosen, chosen.drawn, strict=True))
    seen = {uid: (sum(s for s, _ in visits), sum(s + f for s, f in visits)) for uid, visits in history.items()}
    rates = [(s / n if n else None, n) for s, n in (seen.get(uid, (0, 0)) for uid in uids)]
    columns = {
        "prompt_uid": uids,
        "stage": [stage] * len(uids),
        "reason": [chosen.reason.get(uid) or out[uid] for uid in uids],
        "rank": [rank.get(uid) for uid in uids],
        "drawn": [drawn.get(uid) for uid in uids],
        "score_influence": [chosen.fused.get(uid) for uid in uids],
        "score_wmi": value.tolist(),
        "pass_rate": [rate for rate, _ in rates],
        "n_obs": [n for _, n in rates],
        "alpha": alpha.tolist(),
        "beta": beta.tolist(),
        "ess": [None] * len(uids),
        "log_ratio_p99": [None] * len(uids),
    } | {name: [column.get(uid) for uid in uids] for name, column in measured.items()}
    desk.store.curricula.write(key, columns, {"data": data, "stage": stage, "size": len(chosen.chosen)})
