"""InSight's score: golden numbers, and the facts that follow from them."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.selectors import insight

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/insight.json").read_text())


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: f"Beta({row[0]},{row[1]})")
def test_score_and_weight_have_the_golden_values(row):
    """Weight and score agree with the golden table to 1e-9."""
    alpha, beta, mean, _, weight, score = row
    settings = {"mu": GOLDEN["mu"], "eta": GOLDEN["eta"]}
    assert insight.difficulty_weight(np.array([mean]), **settings)[0] == pytest.approx(weight, abs=1e-9)
    ours = insight.score(np.array([float(alpha)]), np.array([float(beta)]), rollouts=GOLDEN["rollouts"], **settings)
    assert ours[0] == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(("mu", "peak"), GOLDEN["peaks"])
def test_the_weight_peaks_between_mu_and_a_half(mu, peak):
    """The factor m (1 - m) moves the peak of the weight from mu toward a half."""
    grid = np.linspace(0, 1, 100_001)
    best = grid[insight.difficulty_weight(grid, mu=mu, eta=GOLDEN["eta"]).argmax()]
    assert best == pytest.approx(peak, abs=6e-4)


def test_an_unseen_prompt_beats_any_prompt_seen_once():
    """From a flat prior and after 8 rollouts, no outcome scores as high as never having looked."""
    successes = np.arange(9.0)
    unseen = insight.score(np.ones(1), np.ones(1))[0]
    seen = insight.score(1 + successes, 9 - successes)
    assert unseen == pytest.approx(0.1699, abs=5e-5)
    assert seen.max() == pytest.approx(0.0681, abs=5e-5)


def test_a_settled_prompt_scores_lowest():
    """Prompts that always or never succeed score below one that sometimes does."""
    score = insight.score(np.array([40.0, 20.0, 1.0]), np.array([1.0, 21.0, 40.0]))
    assert score.argmax() == 1


@pytest.mark.parametrize(
    ("mu", "eta", "message"), [(3.0, 3.0, "mu = 3.0"), (-0.1, 3.0, "mu"), (0.3, -1.0, "eta = -1.0")]
)
def test_settings_without_meaning_are_refused(mu, eta, message):
    """The appendix's mu = 3.0 is refused, and so is a negative eta."""
    with pytest.raises(ValueError, match=message):
        insight.score(np.ones(1), np.ones(1), mu=mu, eta=eta)
