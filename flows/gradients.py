"""The steps that need gradients: features of prompts, and their scores against the validation sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from flows import evidence, generations
from flows.desk import Desk
from pipeline.columns import texts

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.features import Projection
    from pipeline.policy import Policy

WEIGHTS_DIM = 1024  # of the factored sketch that weights are made from: importance ranks as exact at .97


@dataclass(frozen=True)
class Space:
    """Where gradients are compared.

    Attributes:
        projection: of the gradients.
        scope: layers that are differentiated; None for all that train.
        block: last block and its scope, where the space is that of the way ``scope``.
        metric: name of the metric.
    """

    projection: Projection
    scope: Any
    block: Any
    metric: str


def space(desk: Desk, policy: Policy, name: str) -> Space:
    """Return the space of the features, or that of a way of ``pipeline.weighted``."""
    from pipeline.features import projection_for
    from pipeline.scope import last_block, named

    settings, block, scope = desk.config.features, None, None
    metric = settings.metric if name == "features" else "euclidean"
    if name == "scope":
        block = last_block(policy.model)
        scope = block[1]
    elif name in ("features", "exact") and settings.layers:
        scope = named(policy.model, settings.layers)
    if name in ("bookkeeping", "scope"):
        kind, dim, keep = "factored", WEIGHTS_DIM, 1.0
    else:
        kind, dim, keep = "sparse" if name == "exact" else settings.projection, settings.dim, settings.keep
    if name not in desk.projections:  # its tables are worth keeping from stage to stage
        desk.projections[name] = projection_for(policy, dim, kind=kind, keep=keep, seed=settings.seed, scope=scope)
    return Space(desk.projections[name], scope, block, metric)


def is_that_of_features(desk: Desk, policy: str, name: str) -> bool:
    """Return whether a way's space is the one that features are in, so that their targets serve it."""
    loaded = desk.load(policy)
    ours, theirs = space(desk, loaded, name), space(desk, loaded, "features")
    return (ours.projection.identity, ours.metric) == (theirs.projection.identity, theirs.metric)


def way(desk: Desk, policy: str) -> str:
    """Return the way that steps are weighted, as the settings say or as the size of a batch allows, and say which."""
    from pipeline.weighted import choose

    settings, train = desk.config.diem, desk.config.train
    if settings.way != "auto":
        return settings.way
    prompts = train.minibatch or train.batch
    found, why = choose(desk.load(policy), prompts, prompts * train.rollouts * desk.config.sampling.max_new_tokens)
    desk.reporter.line(f"  weights by the way {found!r}: {why}")
    return found


def featurize(
    desk: Desk, policy: str, uids: Sequence[str], rollouts: Sequence[str], label: str, *, name: str = "features"
) -> list[str]:
    """Project each prompt's policy gradient at ``policy`` over its latest rollouts; one FAISS generation a shard."""
    from pipeline.features import sketch_gradients
    from pipeline.records import Rollouts

    latest = evidence.latest_of(desk, rollouts, uids)
    held = [uids[place] for place in latest.held.tolist()]
    if desk.config.features.ranks > 1:
        from flows import ranks

        return ranks.featurize(desk, policy, held, rollouts, label, name=name)
    loaded, place = desk.load(policy), dict(zip(held, latest.held.tolist(), strict=True))
    where = space(desk, loaded, name)
    metric = optimizer_metric(desk, policy, loaded) if where.metric == "adam" else None
    shards = generations.shards_of(desk, policy, held, rollouts, where)
    with desk.reporter.bar(f"gradients, {label}", len(held)) as advance:
        for key, shard in shards.items():
            if not desk.store.done(key):
                part, watched = Rollouts.of(latest.read([place[uid] for uid in shard])), generations.Watched()
                found, rows = sketch_gradients(
                    loaded,
                    part,
                    desk.config.features.objective,
                    where.projection,
                    micro_tokens=desk.config.policy.micro_tokens,
                    metric=metric,
                    scope=where.scope,
                    watch=watched,
                )
                generations.write_generation(
                    desk, key, policy, where, found, rows, watched if name == "features" else None
                )
            advance(len(shard))
    return list(shards)


def score(desk: Desk, pool: Sequence[str], targets: Mapping[str, tuple[Sequence[str], int]]) -> str:
    """Compare each prompt's gradient with the mean gradient of each validation set, given as (generations, size)."""
    key = desk.store.key(
        "scores", pool=list(pool), targets={name: [list(keys), size] for name, (keys, size) in targets.items()}
    )
    if not desk.store.done(key):
        means = {name: evidence.mean_target(desk, *target) for name, target in targets.items()}
        aimed = _aimed(desk, {name: bool(mean.any()) for name, mean in means.items()})
        queries = np.array([means[name] for name in aimed])
        parts, uids = [np.empty((0, len(aimed)), np.float32)], [texts([])]
        for generation in pool if aimed else ():
            names, cosines = desk.store.gradients.search(generation, queries)
            uids.append(texts(names))
            parts.append(cosines)
        whole = np.concatenate(parts)
        columns: dict[str, Any] = {"prompt_uid": pa.concat_arrays(uids)}
        columns |= {f"cosine_{name}": whole[:, i].astype(float) for i, name in enumerate(aimed)}
        desk.store.tables.write(key, "scores", columns, {"targets": aimed, "pool": list(pool)})
    return key


def score_directional(
    desk: Desk,
    policy: str,
    uids: Sequence[str],
    rollouts: Sequence[str],
    targets: Mapping[str, tuple[Sequence[str], Sequence[str]]],
) -> str:
    """Return each prompt's inner product with each validation set's gradient, from forward passes alone.

    A target is given by its prompts and their rollouts. No gradient of the pool is made, and none is stored.
    """
    from pipeline.directional import dot_scores, target_direction

    settings, micro_tokens = desk.config.features, desk.config.policy.micro_tokens
    key = desk.store.key(
        "scores",
        directional=policy,
        adapter=desk.adapter,
        objective=settings.objective,
        prompts=list(uids),
        rollouts=list(rollouts),
        recent=desk.config.evidence.recent,
        targets={name: [list(of), list(keys)] for name, (of, keys) in targets.items()},
    )
    if not desk.store.done(key):
        loaded, stored = desk.load(policy), evidence.read_rollouts_of(desk, rollouts, uids)
        made = {}
        for name, (of, keys) in targets.items():
            aim = evidence.read_rollouts_of(desk, keys, of)
            made[name] = target_direction(loaded, aim, settings.objective, size=len(of), micro_tokens=micro_tokens)
        aimed = _aimed(desk, {name: any(bool(g.any()) for g in grads.values()) for name, grads in made.items()})
        columns: dict[str, Any] = {"prompt_uid": list(stored.groups())}
        for name in aimed:
            with desk.reporter.bar(f"two forward passes, {name}", 1) as advance:
                found, dots = dot_scores(loaded, stored, settings.objective, made[name])
                advance(1)
            columns[f"dot_{name}"] = dots.tolist()
            assert found == columns["prompt_uid"]
        desk.store.tables.write(key, "scores", columns if aimed else {"prompt_uid": []}, {"targets": aimed})
    return key


def _aimed(desk: Desk, has_gradient: Mapping[str, bool]) -> list[str]:
    for name in [name for name, has in has_gradient.items() if not has]:
        desk.reporter.line(f"  {name}: its rollouts all agree, so it has no gradient to align with; left out")
    return [name for name, has in has_gradient.items() if has]


def optimizer_metric(desk: Desk, key: str, policy: Policy) -> dict[str, Tensor]:
    """Return the metric of the optimizer that a checkpoint was stored with.

    Raises:
        ValueError: it was stored without one.
    """
    from flows.learning import optimizer_tensors
    from pipeline.features import adam_metric

    state = optimizer_tensors(desk, key)
    if state is None:
        raise ValueError("features.metric = 'adam': the policy has no optimizer state yet; use metric = 'euclidean'")
    return adam_metric(policy, state, beta=desk.config.train.betas[1])
