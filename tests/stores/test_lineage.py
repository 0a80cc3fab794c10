"""Lineage: back from a selection to everything that it rests on."""

import pytest

from stores import Missing
from stores.lineage import lineage
from stores.store import Store


def test_everything_behind_a_selection_is_found(store: Store) -> None:
    """A diamond of inputs is walked once, each with its identity, files and origin; what was collected is said."""
    store.origin = {"code": "1+abc", "settings": "settings-0"}
    policy = store.key("policy", checkpoint="x")
    rollouts = store.key("rollouts", policy=policy, seed=1)
    gradients = store.key("gradients", policy=policy, rollouts=[rollouts])
    scores = store.key("scores", pool=[gradients], targets={"valid": [[gradients], 3]})
    for key in (policy, rollouts, gradients, scores):
        store.record(key, key.split("-")[0], {}, {"f": key.encode()})
    found = lineage(store, scores)
    assert set(found) == {scores, gradients, policy, rollouts} and next(iter(found)) == scores
    assert found[scores]["inputs"] == [gradients]
    assert found[gradients]["inputs"] == sorted([policy, rollouts])
    assert found[rollouts]["identity"] == {"policy": policy, "seed": 1}
    assert found[policy]["origin"] == {"code": "1+abc", "settings": "settings-0"}
    assert found[policy]["files"] == {"f": store.get(policy).files["f"].digest}
    store.catalog.retire(policy)
    assert lineage(store, scores)[policy]["kind"] is None
    with pytest.raises(Missing, match="absent"):
        lineage(store, "absent")
