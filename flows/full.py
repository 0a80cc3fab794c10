"""The scores that the gradients of all parameters give, beside those of the adapter that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from flows import gradients, selections
from flows.desk import Desk


def score_full(
    desk: Desk,
    policy: str,
    uids: Sequence[str],
    rollouts: Sequence[str],
    targets: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    scores: str,
) -> str:
    """Score the same prompts from the same rollouts by full gradients; keep how far ``scores`` orders them alike.

    ``policy`` is an untrained checkpoint, to which a fresh adapter adds nothing. A target is given by its prompts and
    their rollouts.
    """
    from pipeline.agreement import rank_agreement

    key = desk.store.key("full", scores=scores, policy=policy, rollouts=list(rollouts), seed=desk.config.seed)
    if not desk.store.done(key):
        desk.take(policy)  # gives up the one in memory: two large policies may not fit
        bare = desk.config.model_copy(update={"policy": desk.config.policy.model_copy(update={"lora": None})})
        other = Desk(bare, desk.folder, desk.store, desk.verifiers, desk.reporter)
        pool = gradients.featurize(other, policy, uids, rollouts, "pool, all parameters")
        aims = {
            name: (gradients.featurize(other, policy, of, keys, f"{name}, all parameters"), len(of))
            for name, (of, keys) in targets.items()
        }
        full = gradients.score(other, pool, aims)
        ours, theirs = desk.store.tables.read(scores), desk.store.tables.read(full)
        row = {uid: i for i, uid in enumerate(theirs["prompt_uid"])}
        both = [(i, row[uid]) for i, uid in enumerate(ours["prompt_uid"]) if uid in row]
        found = {
            name.partition("_")[2]: rank_agreement(
                np.array([ours[name][i] for i, _ in both]), np.array([theirs[name][j] for _, j in both])
            )
            for name in selections.targets_of(ours)
            if name in theirs
        }
        desk.store.tables.write(key, "full", theirs, {"agreement": found, "scores": full})
    for name, found in desk.store.meta(key)["agreement"].items():
        rho = "none" if found["rho"] is None else f"{found['rho']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"
        desk.reporter.line(f"  adapter against all parameters, {name}: Spearman {rho} over {found['n']} prompts")
    return key
