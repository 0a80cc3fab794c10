"""What is wrong is said by name, and nothing that was stored before is lost."""

import io
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pyarrow.parquet as pq
import pytest

from flows.cli import main
from flows.config import Config, to_toml
from flows.progress import Reporter
from flows.run import run
from stores import open_store
from stores.verification import verify
from tests.flows.tiny import keys_of, quiet

Settle = Callable[..., Config]
SHORT = {"controls": False, "train": {"stages": (1, 1)}}
MODULE = """
import time

def hang(completion, ground_truth, spec):
    while completion != ground_truth:
        time.sleep(1)
    return True

def crash(completion, ground_truth, spec):
    if completion != ground_truth:
        raise RuntimeError("on purpose")
    return True
"""


@pytest.fixture
def pool(inputs: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Makes settings of ``[prompts]`` with a pool of the first few rows and some more."""

    def make(*more: dict[str, Any], first: int = 24, **settings: Any) -> dict[str, Any]:
        rows = [json.loads(line) for line in (inputs / "pool.jsonl").read_text().splitlines()][:first]
        (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
        return {"pool": ({"path": str(tmp_path / "pool.jsonl"), "data_source": "tiny"},), **settings}

    return make


def refused(config: Config, folder: Path, error: type[Exception] | tuple[type[Exception], ...]) -> str:
    """Run what must fail in a directory that holds something; returns the message."""
    before = keys_of(folder)
    with pytest.raises(error) as caught:
        quiet(config, folder)
    assert before <= keys_of(folder)
    assert not [verdict.wrong for verdict in verify(open_store(folder / "store")) if verdict.wrong]
    return str(caught.value)


def test_a_missing_column_is_named(settle: Settle, pool: Any, begun: Path):
    """A pool without answers is refused by file and by what an answer's column may be called."""
    message = refused(settle(prompts=pool({"prompt": "123+456="}, first=0)), begun, ValueError)
    assert "pool.jsonl" in message and "ground_truth" in message


def test_an_empty_pool_is_refused(settle: Settle, pool: Any, begun: Path):
    """A pool without a single prompt is refused by its file."""
    assert "pool.jsonl" in refused(settle(prompts=pool(first=0)), begun, ValueError)


def test_a_prompt_longer_than_the_context_is_refused_or_left_out(settle: Settle, pool: Any, begun: Path):
    """A prompt that does not fit is named, with the key that drops it; dropped, it has the reason ``error``."""
    long = {"prompt": "1+" * 15 + "=", "ground_truth": "15", "ability": "long"}
    message = refused(settle(prompts=pool(long)), begun, ValueError)
    assert "longer than the context" in message and "too_long" in message and "'drop'" in message
    quiet(settle(**SHORT, prompts=pool(long, too_long="drop")), begun)
    reasons = Counter(pq.read_table(begun / "export/selection.parquet")["reason"].to_pylist())
    assert reasons["error"] == 2  # once in each of two stages


def test_a_gold_answer_that_its_verifier_rejects_is_refused_or_left_out(settle: Settle, pool: Any, begun: Path):
    """An answer that its own verifier rejects is named, with the key that drops it; dropped, it is an ``error``."""
    wrong = {"prompt": "12+34=", "ground_truth": "x", "ability": "wrong", "reward_spec": json.dumps({"id": "numeric"})}
    message = refused(settle(prompts=pool(wrong)), begun, ValueError)
    assert "bad_gold" in message and "'drop'" in message and "1 prompt" in message
    quiet(settle(**SHORT, prompts=pool(wrong, bad_gold="drop")), begun)
    reasons = Counter(pq.read_table(begun / "export/selection.parquet")["reason"].to_pylist())
    assert reasons["error"] == 2


def test_verifiers_that_hang_or_raise_are_verdicts(
    settle: Settle, pool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A verifier that hangs gives ``timeout``, one that raises ``error``; the run goes on, and no belief is moved."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "unreliable.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    bad = [
        {
            "prompt": f"{name[0]}+34=",
            "ground_truth": "88",
            "ability": name,
            "reward_spec": json.dumps({"id": "python", "function": f"unreliable:{name}"}),
        }
        for name in ("hang", "crash")
    ]
    config = settle(
        controls=False,
        train={"stages": (1,)},
        prompts=pool(*bad, first=12),
        evidence={"source": "collect", "rollouts": 4},
        verifiers={"timeout": 1.0},
    )
    summary = quiet(config, tmp_path / "run")
    assert summary["final"]["curriculum"]["test"]
    store = open_store(tmp_path / "run" / "store")
    stored = store.trajectories.read(store.catalog.keys("trajectories"), ["prompt_uid", "verdict", "reward"])
    verdicts = Counter(stored["verdict"])
    assert verdicts["timeout"] >= 2 and verdicts["error"] >= 2
    failed = {u for u, v in zip(stored["prompt_uid"], stored["verdict"], strict=True) if v in ("timeout", "error")}
    rows = pq.read_table(tmp_path / "run/export/selection.parquet").to_pylist()
    assert {row["n_obs"] for row in rows if row["prompt_uid"] in failed} == {0}


def test_a_checkpoint_with_a_broken_weight_is_named(settle: Settle, inputs: Path, begun: Path, tmp_path: Path):
    """A weight that is not a number stops the run before anything is learnt from it, with the uid of a prompt."""
    from safetensors.torch import load_file, save_file

    copytree(inputs / "checkpoint", tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    config = settle(policy={"checkpoint": str(tmp_path / "broken")})
    message = refused(config, begun, FloatingPointError)
    assert "prompt" in message and "not finite" in message


def test_gradients_that_are_not_finite_are_named(settle: Settle, begun: Path, monkeypatch: pytest.MonkeyPatch):
    """A gradient that is not a number stops the run with the prompt's uid, and no generation holds it."""
    import numpy as np

    from pipeline.projection import SparseProjection

    finish = SparseProjection.finish
    monkeypatch.setattr(SparseProjection, "finish", lambda self, table: finish(self, table) * np.float32("nan"))
    before = keys_of(begun)
    message = refused(settle(**SHORT), begun, FloatingPointError)
    assert "its gradient is not finite" in message
    assert not {key for key in keys_of(begun) - before if key.startswith("gradients-")}


def test_a_checkpoint_that_is_not_there_is_named(settle: Settle, begun: Path, tmp_path: Path):
    """A checkpoint that is neither a folder nor a known model is refused by name, each time it is asked for."""
    config = settle(policy={"checkpoint": str(tmp_path / "absent")})
    for _ in range(2):
        message = refused(config, begun, FileNotFoundError)
        assert str(tmp_path / "absent") in message and "folder" in message
    (tmp_path / "empty").mkdir()
    message = refused(settle(policy={"checkpoint": str(tmp_path / "empty")}), begun, FileNotFoundError)
    assert "config.json" in message


def test_an_unknown_key_costs_nothing(capsys: pytest.CaptureFixture[str], tiny: Config, begun: Path, tmp_path: Path):
    """A key that does not exist is refused by name with the near one, before the run directory is touched."""
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*")}
    (tmp_path / "x.toml").write_text(to_toml(tiny).replace("save_every", "save_evry"))
    assert main(["run", str(tmp_path / "x.toml"), "--no-prefect", "--dir", str(begun)]) == 2
    message = capsys.readouterr().err
    assert "'train.save_evry'" in message and "'save_every'" in message
    assert {path: path.stat().st_mtime_ns for path in begun.rglob("*")} == before


@pytest.mark.parametrize("split", ["pool", "validation"])
def test_a_run_goes_on_where_there_is_no_signal(settle: Settle, pool: Any, tmp_path: Path, split: str):
    """A pool, or a validation set, on which all rollouts agree gives a stage of chance, not a failure."""
    rows = [{"prompt": f"{i}{i}*{i}{i}=", "ground_truth": "00000", "ability": "hopeless"} for i in range(8)]
    if split == "pool":
        prompts = pool(*rows, first=0)
    else:
        (tmp_path / "hopeless.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
        source = {"path": str(tmp_path / "hopeless.jsonl"), "data_source": "tiny"}
        prompts = {"validation": {"hopeless": (source,)}}
    summary = quiet(settle(**SHORT, prompts=prompts), tmp_path / "run")
    stages = summary["runs"][0]["arms"]["curriculum"]["stages"]
    assert [stage["selected"] > 0 for stage in stages] == [True, True]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no small disk can be made here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(os.name != "posix", reason="mounts a small disk")
def test_a_full_disk_stops_the_run_and_loses_nothing(settle: Settle, small_disk: Path):
    """A run whose disk fills up fails with the path and the remedy; with more space the same command finishes it."""
    config = settle(**SHORT)
    with pytest.raises(OSError, match="No space left") as caught:
        quiet(config, small_disk / "run")
    assert str(small_disk) in str(caught.value) and "free some space" in str(caught.value)
    before = keys_of(small_disk / "run")
    assert any(key.startswith("evaluation-") for key in before)
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    began = time.monotonic()
    assert quiet(config, small_disk / "run")["final"]["curriculum"]["test"]
    assert time.monotonic() - began < 60
    assert before <= keys_of(small_disk / "run")


def test_text_of_a_data_set_is_never_markup(
    settle: Settle, inputs: Path, pool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Prompts and abilities that look like markup are shown as they are."""
    rows = [json.loads(line) for line in (inputs / "pool.jsonl").read_text().splitlines()]
    marked = [row | {"prompt": f"[/b]{row['prompt']}", "ability": "[/red]"} for row in rows]
    run(settle(**SHORT, prompts=pool(*marked, first=0)), tmp_path / "run", Reporter())
    shown = capsys.readouterr().err
    assert "of which: [/red] 8" in shown
    assert "[/b]" in shown


def test_the_reporter_takes_no_text_for_markup(monkeypatch: pytest.MonkeyPatch):
    """Headings, lines, tables and bars print brackets as brackets, on a terminal too."""
    from rich.console import Console

    reporter, text = Reporter(), "[/x] [bold]y"
    for terminal in (False, True):
        reporter.console = Console(file=io.StringIO(), force_terminal=terminal, color_system=None, width=200)
        reporter.heading(text)
        reporter.line(text)
        reporter.table(text, ["a", text], [[text, text]])
        with reporter.bar(text, 1) as advance:
            advance(1)
        assert reporter.console.file.getvalue().count(text) >= 6


def test_near_repeats_are_left_out_when_asked(settle: Settle, inputs: Path, tmp_path: Path):
    """With ``prompts.near`` a text that is nearly another's counts as a duplicate; without it only an equal text does."""
    from flows import prepare
    from flows.progress import Reporter
    from flows.run import open_desk

    pool = [json.loads(line) for line in (inputs / "pool.jsonl").read_text().splitlines()]
    more = [{**pool[0], "prompt": pool[0]["prompt"] + end} for end in ("1", "12")]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*pool, *more]))
    found = {}
    for near in (0.0, 0.6):
        sources = {"pool": [{"path": str(tmp_path / "more.jsonl"), "data_source": "tiny"}], "near": near}
        with open_desk(settle(prompts=sources), tmp_path / f"run{near}", Reporter(quiet=True)) as desk:
            table = desk.store.tables.read(prepare.prompts(desk, prepare.start_policy(desk)))
            found[near] = table["reason"].count("duplicate")
    assert found[0.0] == 0 and found[0.6] >= 1


@pytest.fixture
def seen(inputs: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of ``[prompts]`` with a pool whose last row is an image."""
    row = {"prompt": [{"role": "user", "content": [{"type": "image", "url": "https://example.org/a.png"}]}]}
    file = tmp_path / "seen.jsonl"
    file.write_text(
        (inputs / "pool.jsonl").read_text() + json.dumps(row | {"ground_truth": "2", "ability": "see"}) + "\n"
    )
    return {"pool": ({"path": str(file), "data_source": "tiny"},)}


def test_a_prompt_with_an_image_is_refused_by_name(settle: Settle, seen: dict[str, Any], tmp_path: Path):
    """Where rollouts are sampled the prompt with an image is named, and so it is before a stage with it is trained."""
    named = r"prompt [0-9a-f]{32} holds 1 image\(s\).*leave such rows out of the pool"
    with pytest.raises(ValueError, match=named):
        quiet(settle(prompts=seen, evidence={"source": "collect", "rollouts": 2}), tmp_path / "collected")
    with pytest.raises(ValueError, match=named):
        quiet(settle(prompts=seen, train={"stages": (7,)}), tmp_path / "trained")  # a stage of the whole pool
    assert not [key for key in keys_of(tmp_path / "trained") if key.startswith("rollouts")]


def test_images_are_imported_drawn_and_exported_but_get_no_gradient(
    settle: Settle, seen: dict[str, Any], tmp_path: Path
):
    """A pool with an image is stored, gets imported rollouts, and is exported from a shuffle; gradients refuse it."""
    from flows import collecting, evidence, prepare, steps
    from flows.arms import Arm, Stage
    from flows.export import export
    from flows.run import open_desk
    from pipeline.messages import has_images

    file = tmp_path / "rollouts.jsonl"
    config = settle(prompts=seen, evidence={"source": "import", "path": str(file)}, policy={"memory_gib": 1.0})
    with open_desk(config, tmp_path / "run", Reporter(quiet=True)) as desk:
        start = prepare.start_policy(desk)
        data = prepare.prompts(desk, start)
        pool = desk.prompts(data, "pool")
        (image,) = [uid for uid, m in zip(pool.prompt_uid, pool.messages, strict=True) if has_images(m)]
        row = {"prompt_uid": image, "prompt_ids": [3], "completion_ids": [4, 5], "logp_old": [-1.0, -1.0]}
        verdicts = ("correct", "incorrect")
        file.write_text("".join(json.dumps(row | {"verdict": verdict}) + "\n" for verdict in verdicts))
        rollouts = collecting.import_rollouts(desk, data)
        drawn = steps.shuffle(desk, data, rollouts, 0, budget=len(pool), seed=1)
        stage = Stage(0, drawn, 1, start, drawn)
        folder = export(desk, data, Arm("curriculum", start, "", [stage]))
        with pytest.raises(ValueError, match=rf"prompt {image} holds 1 image"):
            evidence.cascade(desk, data, rollouts)
    written = folder / "data/stage_00/train.parquet"
    rows = {row["prompt_uid"]: row for row in pq.read_table(written).to_pylist()}
    assert rows[image]["images"] == [{"bytes": None, "path": "https://example.org/a.png"}]
    assert rows[image]["n_obs"] == 2 and rows[image]["pass_rate"] == 0.5
    assert [uid for uid, row in rows.items() if row["images"]] == [image]
