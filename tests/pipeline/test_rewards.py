"""The pool of verifiers: hard time limits, deaths, order, and the check of gold answers."""

import json
import time
from pathlib import Path

import pytest

from pipeline.prompts import load_prompts
from pipeline.records import Prompts, canonical
from pipeline.rewards import Verdict, VerifierPool, check_gold, check_specs
from pipeline.verifiers import score_reasoning_gym

RIGHT = Verdict("correct", 1.0)


@pytest.fixture(autouse=True)
def samples(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def spec(name, **keys):
    return canonical({"id": name, **keys})


def sample(function, **keys):
    return spec("python", function=f"verifier_samples:{function}", **keys)


def pool_of(rows):
    """Prompts with the given (uid, ground truth, verifier) rows."""
    message = canonical([{"role": "user", "content": "?"}])
    return Prompts.of(
        {
            "prompt_uid": [row[0] for row in rows],
            "messages": [message] * len(rows),
            "ground_truth": [row[1] for row in rows],
            "data_source": ["d"] * len(rows),
            "ability": ["a"] * len(rows),
            "verifier": [row[2] for row in rows],
        }
    )


def test_strings_need_no_worker():
    """``exact`` and ``numeric`` are scored here: no process is started for them."""
    with VerifierPool() as pool:
        assert pool.score([(spec("exact"), "4", "4"), (spec("numeric"), "4", "4.0")]) == [RIGHT, RIGHT]
        assert pool._pool is None


def test_order_is_kept_across_kinds(capfd):
    """Verdicts come in the order of the items, whoever scores them, and workers' output reaches no stream."""
    items = [(sample("echo") if i % 3 else spec("exact"), str(i), str(i - i % 2)) for i in range(600)]
    with VerifierPool(2) as pool:
        verdicts = pool.score(items)
    assert [verdict == RIGHT for verdict in verdicts] == [i % 2 == 0 for i in range(600)]
    assert capfd.readouterr() == ("", "")


def test_a_hanging_verifier_costs_its_time_limit_only():
    """An endless verifier gets ``timeout`` within the limit, and every other item its verdict."""
    items = [(sample("hang"), "", "hang" if i in (0, 3) else "ok") for i in range(8)]
    with VerifierPool(2, timeout=1.0) as pool:
        pool.score([(sample("hang"), "", "ok")] * 2)
        start = time.monotonic()
        verdicts = [verdict.verdict for verdict in pool.score(items)]
    assert verdicts == ["timeout" if i in (0, 3) else "correct" for i in range(8)]
    assert time.monotonic() - start < 12


@pytest.mark.parametrize("kind", ["regex", "loop in C", "deaf"])
def test_a_verifier_that_hangs_in_c_is_killed(kind):
    """A regex or a loop inside C code, which no exception reaches, and a process deaf to signals cost the limit only."""
    with VerifierPool(1, timeout=1.0) as pool:
        pool.score([(sample("hang_in_c"), "", "ok")])
        start = time.monotonic()
        verdicts = pool.score([(sample("hang_in_c"), "", kind), (sample("hang_in_c"), "", "ok")])
    assert [v.verdict for v in verdicts] == ["timeout", "correct"]
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    "said", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{1000000000!}", "$" + "(" * 3000 + "1" + ")" * 3000 + "$"]
)
def test_mathematics_without_end_is_a_timeout(said):
    """Answers that math-verify would compute for ever are stopped at the limit, and the next one is scored."""
    with VerifierPool(1, timeout=2.0) as pool:
        verdicts = pool.score([(spec("math-verify"), "1", said), (spec("math-verify"), "1/2", "0.5")])
    assert [v.verdict for v in verdicts] == ["timeout", "correct"]


def test_a_scorer_of_reasoning_gym_that_raises_is_an_error():
    """Text where prime_factorization expects integers makes its scorer raise, which is an error and no failure."""
    entry = load_prompts({"path": "reasoning-gym/prime_factorization", "size": 1})
    item = (entry.verifier[0], entry.ground_truth[0])
    with pytest.raises(ValueError, match="invalid literal"):
        score_reasoning_gym(json.loads(item[0]), "two x three")
    with VerifierPool(1) as pool:
        verdicts = pool.score([(*item, "two x three"), (*item, entry.ground_truth[0])])
    assert [v.verdict for v in verdicts] == ["error", "correct"]


def test_a_failing_verifier_is_an_error_and_the_pool_goes_on():
    """A verifier that raises, exits or kills its worker gives ``error``; the items around it are scored."""
    words = ["ok", "raise", "ok", "die", "ok", "exit", "die", "ok"]
    with VerifierPool(2) as pool:
        verdicts = [v.verdict for v in pool.score([(sample("misbehave"), "", word) for word in words])]
        assert pool.score([(sample("misbehave"), "", "ok")]) == [RIGHT]
    assert verdicts == ["correct" if word == "ok" else "error" for word in words]


def test_one_worker_that_dies_each_time_is_replaced():
    """A pool of one worker survives deaths in a row."""
    with VerifierPool(1) as pool:
        verdicts = pool.score([(sample("misbehave"), "", word) for word in ("die", "die", "ok")])
    assert [v.verdict for v in verdicts] == ["error", "error", "correct"]


def test_math_and_gym_verifiers_run_in_workers(capfd):
    """math-verify and reasoning-gym score in the pool as they do in this process, without a word."""
    entry = {"question": "1 + 1 =", "answer": "2", "metadata": {"source_dataset": "chain_sum"}}
    items = [
        (spec("math-verify"), "1/2", "0.5"),
        (spec("math-verify"), "hello", "0.5"),
        (spec("reasoning-gym", entry=entry), "2", "2"),
    ]
    with VerifierPool(1) as pool:
        assert [v.verdict for v in pool.score(items)] == ["correct", "unscorable", "correct"]
    assert capfd.readouterr() == ("", "")


def test_gold_check_finds_planted_wrong_gold():
    """The gold check names the prompts whose own answer their verifier does not accept, and no others."""
    right = {
        "question": "1 + 1 =",
        "answer": "2",
        "metadata": {"source_dataset": "countdown", "numbers": [2], "target": 2},
    }
    wrong = right | {"answer": "1 + 1"}
    rows = [
        ("a", "7", spec("exact")),
        ("b", "seven", spec("numeric")),
        ("c", r"\frac12", spec("math-verify")),
        ("d", "who knows", spec("math-verify")),
        ("e", "2", spec("reasoning-gym", entry=right)),
        ("f", "2", spec("reasoning-gym", entry=wrong)),
        ("g", "raise", sample("misbehave")),
    ]
    with VerifierPool(1) as pool:
        assert check_gold(pool_of(rows), pool) == {"b": "unscorable", "d": "unscorable", "f": "incorrect", "g": "error"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (canonical({"id": "exakt"}), r"'exakt'.*'exact'"),
        (canonical({}), "None"),
        (canonical([]), "is unknown"),
        ("exact", "not JSON"),
        (canonical({"id": "numeric", "tolerence": 1}), "did you mean 'tolerance'"),
        (canonical({"id": "numeric", "take": "middle"}), "'middle'"),
        (canonical({"id": "numeric", "tolerance": -1}), "tolerance = -1"),
        (canonical({"id": "python", "threshold": True, "function": "json:loads"}), "threshold = True"),
        (canonical({"id": "python"}), "package.module:function"),
        (canonical({"id": "python", "function": "verifier_samples:absent"}), "cannot be imported"),
        (canonical({"id": "python", "function": "no_such_module:f"}), "cannot be imported"),
        (canonical({"id": "python", "function": "verifier_samples:os"}), "not a function"),
        (canonical({"id": "reasoning-gym", "entry": {}}), "source_dataset"),
    ],
)
def test_specs_that_cannot_run_are_refused(text, message):
    """A spec that cannot run fails before any rollout, with what is wrong about it."""
    with pytest.raises(ValueError, match=message):
        check_specs(pool_of([("a", "1", text)]))


def test_usable_specs_pass():
    """Every documented spec passes, and a python verifier may have keys of its own."""
    specs = [spec("exact"), spec("numeric", take="first", tolerance=0.5), sample("echo", mine=1)]
    check_specs(pool_of([(str(i), json.dumps(i), text) for i, text in enumerate(specs)]))


@pytest.mark.parametrize(("keys", "message"), [({"processes": 0}, "processes = 0"), ({"timeout": 0}, "timeout = 0")])
def test_a_pool_without_workers_or_time_is_refused(keys, message):
    """A pool needs a worker and a time limit."""
    with pytest.raises(ValueError, match=message):
        VerifierPool(**keys)
