"""Versions of verifiers, and stored rollouts under another verifier."""

import importlib
import json
from importlib.metadata import version

import pytest

from pipeline.records import canonical
from pipeline.rescoring import REVISIONS, changes, rescore, versions
from pipeline.rewards import verify
from pipeline.verifiers import SPEC_KEYS


def score(items):
    return [verify(json.loads(spec), truth, text) for spec, truth, text in items]


@pytest.fixture
def stored(llama, make_rollouts, make_prompts):
    """Two groups of rollouts with texts, and their prompts."""
    from dataclasses import replace

    prompts = make_prompts([("1+1", "2"), ("2+2", "4")])
    rollouts = make_rollouts(llama, prompts=2, samples=3)
    uids = tuple(prompts.prompt_uid[int(uid[-1])] for uid in rollouts.prompt_uid)
    texts = ("2", "is 2", "3", "4", "4.0", "so 4", "5")
    return replace(
        rollouts,
        prompt_uid=uids,
        text=texts,
        finish_reason=("stop",) * 6 + ("length",),
        verdict=("correct", "incorrect", "incorrect", "correct", "incorrect", "incorrect", "truncated"),
        reward=(1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0),
    ), prompts


def test_other_verdicts_for_the_same_rollouts(stored):
    """Another verifier changes verdicts and rewards as by hand, and no other column; a cut-off completion stays one."""
    from dataclasses import replace

    rollouts, prompts = stored
    assert rescore(rollouts, prompts, score) == rollouts  # the verifier that they have: the same again
    numeric = replace(prompts, verifier=(canonical({"id": "numeric"}),) * 2)
    after = rescore(rollouts, numeric, score)
    assert after.verdict == ("correct", "correct", "incorrect", "correct", "correct", "correct", "truncated")
    assert after.reward == (1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0)
    assert {n: c for n, c in after.columns().items() if n not in ("verdict", "reward")} == {
        n: c for n, c in rollouts.columns().items() if n not in ("verdict", "reward")
    }
    assert changes(rollouts, after) == {"incorrect -> correct": 3}


def test_a_rollout_without_text_is_not_scored_as_empty(stored):
    """Tokens without text were imported without it: scoring the empty string would be a lie, so it is refused."""
    from dataclasses import replace

    rollouts, prompts = stored
    long = max(range(7), key=lambda i: len(rollouts.completion_ids[i]))
    texts = tuple("" if i == long else text for i, text in enumerate(rollouts.text))
    with pytest.raises(ValueError, match="tokens and no text"):
        rescore(replace(rollouts, text=texts), prompts, score)


def test_every_verifier_has_a_version():
    """Each known verifier has a revision, and a version that names the libraries which decide."""
    assert set(REVISIONS) == set(SPEC_KEYS)
    found = versions([canonical({"id": name}) for name in ("exact", "numeric", "math-verify", "reasoning-gym")])
    assert found["exact"] == "1"
    assert f"math-verify {version('math-verify')}" in found["math-verify"]
    assert f"reasoning_gym {version('reasoning_gym')}" in found["reasoning-gym"]


def test_a_python_verifier_has_the_version_of_its_file(tmp_path, monkeypatch):
    """Editing the file of a user's verifier gives it another version, although its name is the same."""
    monkeypatch.syspath_prepend(str(tmp_path))
    spec, found = canonical({"id": "python", "function": "my_rule:judge"}), []
    for body in ("return True", "return False", "return True"):
        (tmp_path / "my_rule.py").write_text(f"def judge(completion, ground_truth, spec):\n    {body}\n")
        importlib.invalidate_caches()
        found.append(versions([spec])["python my_rule:judge"])
    assert found[0] == found[2] != found[1]
