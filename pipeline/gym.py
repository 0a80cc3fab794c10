"""Prompts of reasoning-gym, and what is wrong with some of its tasks: refused, or made so that it does no harm.

With ``pipeline.verifiers`` the only door to ``reasoning_gym``.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.records import canonical
from pipeline.verifiers import score_reasoning_gym

PREFIX = "reasoning-gym/"
HASH_SEEDED = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
"""Tasks whose entries change with PYTHONHASHSEED; they are made in a process of their own, under seed 0."""


def gym_entries(source: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Return the entries of a reasoning-gym task."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task, size = str(source["path"])[len(PREFIX) :], source.get("size")
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        raise ValueError(f"path = {source['path']!r}: reasoning-gym has no task {task!r}; did you mean one of {near}?")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size = {size!r} of {source['path']!r} must be a number of prompts, at least 1")
    wanted = {"name": task, "seed": int(source.get("seed", 0)), "size": size, **source.get("settings", {})}
    if task in HASH_SEEDED:
        return _under_fixed_hash_seed(wanted)
    try:
        entries: Iterable[dict[str, Any]] = reasoning_gym.create_dataset(**wanted)
    except (AssertionError, TypeError, ValueError) as err:  # its tasks check their settings by assert
        raise ValueError(f"{source['path']!r} with settings = {source.get('settings', {})}: {err}; mend them") from err
    return entries


def _under_fixed_hash_seed(wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries that a process with PYTHONHASHSEED=0 makes: the same ones on every day and machine."""
    program = "import json, sys, reasoning_gym as g; print(json.dumps(list(g.create_dataset(**json.load(sys.stdin)))))"
    made = subprocess.run(
        [sys.executable, "-P", "-c", program],
        input=json.dumps(wanted),
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise ValueError(f"reasoning-gym makes no entries with {wanted}: {made.stderr.strip().splitlines()[-1:]}")
    return list(json.loads(made.stdout.splitlines()[-1]))


def gym_row(source: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return one entry as a row, with its verifier."""
    spec: dict[str, Any] = {"id": "reasoning-gym"} | dict(source.get("verifier", {}))
    if spec["id"] == "reasoning-gym":
        spec = {"threshold": 0.99} | spec | {"entry": entry}
        if source.get("settings"):
            spec["settings"] = source["settings"]
        _check_round_trip(spec, str(source["path"]))
    name = source.get("data_source", source["path"])
    return {
        "prompt": entry["question"],
        "ground_truth": entry["answer"],
        "data_source": name,
        "verifier": canonical(spec),
    }


def _check_round_trip(spec: dict[str, Any], path: str) -> None:
    """Refuse a task that scores its own answer differently once the entry went through JSON."""
    answer = spec["entry"]["answer"]
    if answer is None:
        raise ValueError(f"{path!r} makes entries without an answer; choose a task that has one")
    try:
        copy = json.loads(canonical(spec))
    except (TypeError, ValueError) as err:
        raise ValueError(f"the entries of {path!r} cannot be kept as JSON ({err}); choose another task") from err
    before, after = score_reasoning_gym(spec, answer), score_reasoning_gym(copy, answer)
    if before != after:
        raise ValueError(f"{path!r} scores its own answer {before}, but {after} once kept as JSON; choose another task")
