"""Whether scores say what prompts do: ``influent evaluate --validity``, on the newest checkpoint of a run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from flows import gradients
from flows.curriculum import run_curriculum
from flows.desk import Desk
from flows.do import Do
from flows.progress import Reporter
from flows.run import plain
from flows.summary import write_json
from pipeline.records import Prompts, Rollouts
from stores.store import Store

FILE = "validity.json"
PROMPTS = 128


def measure(desk: Desk, prompts: int) -> dict[str, Any]:
    """Score ``prompts`` prompts of the pool, measure what each does, and return how far the scores predict it.

    Rollouts, effects and result are keyed: asked again, nothing is computed. The result is written to ``FILE`` too.

    Raises:
        ValueError: a validation or test prompt has no unique answer, or there are too few prompts.
    """
    from pipeline.evaluation import require_exact
    from pipeline.selectors import uniform
    from pipeline.validity import REVISION

    do, config = Do(desk, plain), desk.config
    start = do("start_policy")
    data = do("prompts", start)
    splits = [split for split in desk.splits(data) if split != "pool"]
    for split in splits:
        require_exact(desk.prompts(data, split), f"[prompts] {split}")
    pool = desk.pool(data).to_pylist()
    if not 2 <= prompts <= len(pool):
        raise ValueError(f"--prompts {prompts}: the pool has {len(pool)} prompts; ask for 2 to that many")
    step, policy = newest(desk, start, data)
    desk.reporter.heading(f"validity at step {step}, seed {config.seed}")
    drawn = uniform.score(pool, seed=desk.seed("validity"))
    uids = [pool[i] for i in drawn.argsort(kind="stable")[:prompts]]
    validation = desk.validation(data)
    count, aim = config.evidence.rollouts, config.evidence.validation_rollouts
    own, other = (
        do("collect", policy, data, "pool", rollouts=count, seed=desk.seed("validity", draw), uids=uids)
        for draw in ("own", "other")
    )
    seed = desk.seed("validity", "target")
    goals = [key for split in validation for key in do("collect", policy, data, split, rollouts=aim, seed=seed)]
    key = desk.store.key(
        "validity",
        revision=REVISION,
        policy=policy,
        dtype=config.policy.dtype,
        adapter=desk.adapter,
        data=data,
        own=own,
        other=other,
        goals=goals,
        features=config.features.model_dump(),
        insight=config.insight.model_dump(),
        prior=config.beliefs.prior,
        seed=config.seed,
    )
    if not desk.store.done(key):
        held_out = {"validation": Prompts.concat(desk.prompts(data, split) for split in validation)}
        held_out["test"] = desk.prompts(data, "test")
        columns, result = _compare(desk, policy, uids, own, other, goals, held_out)
        result |= {"step": step, "seed": config.seed, "policy": policy, "dim": config.features.dim}
        result |= {"rollouts": count, "validation_rollouts": aim, "held_out": {n: len(p) for n, p in held_out.items()}}
        desk.store.tables.write(key, "validity", columns, {"result": result})
    result = {"key": key, **desk.store.meta(key)["result"]}
    write_json(desk.folder / FILE, result)
    _show(desk.reporter, result)
    return result


def newest(desk: Desk, start: str, data: str) -> tuple[int, str]:
    """Return the last checkpoint that the curriculum has reached, and its step; the start where it has none.

    The loop is replayed over what the store holds, and ends where something would have to be made.
    """
    replay = Desk(desk.config, desk.folder, _Made(desk.store), desk.verifiers, Reporter(quiet=True))
    reached = [(0, start)]

    def watch(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            key = step(*args, **kwargs)
            if name == "train":
                reached.append((kwargs["first"] + kwargs["steps"], key))
            return key

        return call

    with contextlib.suppress(_NotMade):
        run_curriculum(Do(replay, watch), data, start)
    return reached[-1]


def stored(desk: Desk) -> dict[str, Any] | None:
    """Return the result that the run directory names, from the store; None where validity was not measured."""
    file = desk.folder / FILE
    key = json.loads(file.read_text()).get("key", "") if file.is_file() else ""
    return {"key": key, **desk.store.meta(key)["result"]} if key and desk.store.done(key) else None


def tell(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a person reads of a result: one line a scorer, and what the lines rest on."""
    lines: dict[str, Any] = {"step": result["step"], "prompts with signal": result["prompts"]["signal"]}
    for name in scorers():
        cells = [f"{effect} {_cell(result['agreement'][effect]['validation'][name])}" for effect in effects()]
        lines[name] = "; ".join(cells)
    lines["reliability"] = "; ".join(f"{name} {_number(r['whole'])}" for name, r in result["reliability"].items())
    lines["cosine of the target to grad J"] = _number(result["target_cosine"])
    if result["dtype"]:
        lines[f"cosine of gradients in {result['dtype']['dtype']} to float32"] = _number(result["dtype"]["mean"])
    return lines


def scorers() -> list[str]:
    """Return the names of the scorers, in the order of their table."""
    from pipeline.scorers import SCORERS

    return list(SCORERS)


def effects() -> tuple[str, ...]:
    """Return the names of the effects."""
    from pipeline.validity import EFFECTS

    return EFFECTS


class _NotMade(Exception):
    """A step that the replay would have had to compute."""


class _Made(Store):
    """The store as it is: a step that asks for what is not there ends the replay."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.root, store.objects, store.catalog)

    def done(self, key: str) -> bool:
        """Return True, or end the replay."""
        if not super().done(key):
            raise _NotMade(key)
        return True


def _compare(
    desk: Desk,
    policy: str,
    uids: Sequence[str],
    own: Sequence[str],
    other: Sequence[str],
    goals: Sequence[str],
    held_out: dict[str, Prompts],
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    from pipeline.features import sketch_gradients
    from pipeline.scorers import Settings
    from pipeline.validity import compare, of_prompts, with_signal, work

    config, loaded = desk.config, desk.load(policy)
    scored, again, aims = (Rollouts.of(desk.store.trajectories.read(keys)) for keys in (own, other, goals))
    scored = of_prompts(scored, uids)  # in the order drawn: the pool that is retrained is the first of them
    where = gradients.space(desk, loaded, "features")
    sketch = partial(
        sketch_gradients,
        objective=config.features.objective,
        projection=where.projection,
        micro_tokens=config.policy.micro_tokens,
        metric=gradients.optimizer_metric(desk, policy, loaded) if where.metric == "adam" else None,
        scope=where.scope,
    )
    settings = Settings(
        objective=config.features.objective,
        sketch=sketch,
        prior=config.beliefs.prior,
        mu=config.insight.mu,
        eta=config.insight.eta,
        seed=config.seed,
        chat=config.policy.chat,
        micro_tokens=config.policy.micro_tokens,
    )
    with desk.reporter.bar("steps and retrainings", work(len(with_signal(scored).groups()))) as advance:
        return compare(loaded, scored, again, aims, held_out, settings, advance=advance)


def _show(reporter: Reporter, result: dict[str, Any]) -> None:
    for split in sorted(result["held_out"], reverse=True):  # validation first
        rows = [[name, *(_cell(result["agreement"][e][split][name]) for e in effects())] for name in scorers()]
        title = f"rank agreement of scores with the change of expected reward, {split}"
        reporter.table(title, ["score", *(effect.replace("_", " ") for effect in effects())], rows)


def _cell(found: dict[str, Any]) -> str:
    if found["rho"] is None:
        return "none"
    return f"{found['rho']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
