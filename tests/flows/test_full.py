"""The scores by all parameters, against gradients of all parameters that are computed one by one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from flows import collecting, full, gradients, prepare
from flows.config import Config
from flows.progress import Reporter
from flows.run import open_desk
from pipeline.policy import load_policy
from pipeline.records import Rollouts
from tests.oracles import gradients_by_loop

DIM = 8192
ERROR = 0.05  # of a cosine, four of its deviations at DIM


def by_loop(checkpoint: Path, rollouts: Rollouts, objective: str) -> dict[str, np.ndarray]:
    """Return the gradient of each prompt with a signal by every parameter of a checkpoint, as one vector."""
    found = gradients_by_loop(load_policy(checkpoint, attention="eager"), rollouts, objective)
    flat = {uid: torch.cat([g.flatten() for g in grads.values()]).numpy() for uid, grads in found.items()}
    return {uid: g for uid, g in flat.items() if g.any()}


def test_full_scores_are_cosines_of_all_parameters(settle: Callable[..., Config], inputs: Path, tmp_path: Path):
    """Beside an adapter's scores, each prompt's cosine by all parameters is the one computed directly, to the sketch."""
    config = settle(
        policy={"lora": {"rank": 2, "alpha": 4, "targets": "all-linear"}},
        evidence={"source": "collect", "rollouts": 4},
        features={"dim": DIM, "compare_full": True},
    )
    with open_desk(config, tmp_path / "run", Reporter(quiet=True)) as desk:
        start = prepare.start_policy(desk)
        data = prepare.prompts(desk, start)
        uids, aim = desk.prompts(data, "pool").prompt_uid, desk.prompts(data, "add").prompt_uid
        rollouts, aimed = (
            collecting.collect(desk, start, data, split, rollouts=n, seed=1) for split, n in (("pool", 4), ("add", 8))
        )
        pool = gradients.featurize(desk, start, uids, rollouts, "pool")
        target = gradients.featurize(desk, start, aim, aimed, "add")
        scores = gradients.score(desk, pool, {"add": (target, len(aim))})
        key = full.score_full(desk, start, uids, rollouts, {"add": (aim, aimed)}, scores)
        assert key == full.score_full(desk, start, uids, rollouts, {"add": (aim, aimed)}, scores)
        table, ours = desk.store.tables.read(key), desk.store.tables.read(scores)
        agreement = desk.store.meta(key)["agreement"]["add"]
        stored, wanted = (Rollouts.of(desk.store.trajectories.read(keys)) for keys in (rollouts, aimed))
        assert all("lora" in name for name in desk.load(start).trainable())  # the run's own policy is as it was
    objective = config.features.objective
    each, whole = (by_loop(inputs / "checkpoint", part, objective) for part in (stored, wanted))
    mean = np.sum(list(whole.values()), axis=0)
    direct = {uid: float(g @ mean / np.linalg.norm(g) / np.linalg.norm(mean)) for uid, g in each.items()}
    assert set(table["prompt_uid"]) == set(direct) and len(direct) >= 8
    expected = [direct[uid] for uid in table["prompt_uid"]]
    assert table["cosine_add"] == pytest.approx(expected, abs=ERROR)
    adapter = dict(zip(ours["prompt_uid"], ours["cosine_add"], strict=True))
    beside = [adapter[uid] for uid in table["prompt_uid"]]
    assert np.abs(np.subtract(beside, expected)).max() > 2 * ERROR  # an adapter's are others
    assert agreement["n"] == len(direct)
    assert agreement["rho"] == pytest.approx(spearmanr(beside, table["cosine_add"]).statistic)
