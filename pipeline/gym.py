"""Prompts of reasoning-gym, and what is wrong with some of its tasks: refused, or made so that it does no harm.

With ``pipeline.verifiers`` the only door to ``reasoning_gym``.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from pipeline.records import canonical

PREFIX = "reasoning-gym/"
VERIFIER = "reasoning-gym"
HASH_SEEDED = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
"""Tasks whose entries change with PYTHONHASHSEED; like all others they are made under seed 0."""

SECONDS = (60.0, 1.0)
"""Hard limit for making the entries of a source and scoring each one's own answer: to begin with, and an entry [s]."""

PROGRAM = """
import json, sys
import reasoning_gym
wanted, score = json.load(sys.stdin)
out = []
try:
    made = reasoning_gym.create_dataset(**wanted)
except (AssertionError, TypeError, ValueError) as error:  # its tasks check their settings by assert
    made = out = {"refused": str(error)}
for entry in made if out == [] else ():
    try:
        copy = json.loads(json.dumps(entry))
    except (TypeError, ValueError) as error:
        out = {"unkept": str(error)}
        break
    asked = (entry, copy) if score and entry["answer"] is not None else ()
    out.append([copy, [float(made.score_answer(answer=entry["answer"], entry=e)) for e in asked]])
print(json.dumps(out))
"""
"""Makes entries, and scores each one's own answer before and after it went through JSON."""


def gym_rows(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a reasoning-gym task as rows, with their verifiers.

    They are made and scored in a process of their own, under PYTHONHASHSEED=0: the same ones on every day and machine,
    and within a time limit.

    Raises:
        ValueError: there is no such task, or it makes no entries that can be kept and scored; the message names it.
    """
    import reasoning_gym  # noqa: F401  registers the tasks
    from reasoning_gym.factory import DATASETS

    task, size = str(source["path"])[len(PREFIX) :], source.get("size")
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3)
        raise ValueError(f"path = {source['path']!r}: reasoning-gym has no task {task!r}; did you mean one of {near}?")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size = {size!r} of {source['path']!r} must be a number of prompts, at least 1")
    wanted = {"name": task, "seed": int(source.get("seed", 0)), "size": size, **source.get("settings", {})}
    own = dict(source.get("verifier", {})).get("id", VERIFIER) == VERIFIER
    return [_row(source, entry, scores) for entry, scores in _made(source, wanted, own)]


def _made(source: Mapping[str, Any], wanted: dict[str, Any], score: bool) -> list[tuple[dict[str, Any], list[float]]]:
    """Return each entry as JSON keeps it, with the scores of its own answer before and after that, if asked for."""
    path, limit = str(source["path"]), SECONDS[0] + SECONDS[1] * wanted["size"]
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM],
            input=json.dumps([wanted, score]),
            env={**os.environ, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as err:
        raise ValueError(
            f"{path!r} did not make its {wanted['size']} entries and score their own answers within {limit:g} s; "
            "choose another task, a smaller size or easier settings"
        ) from err
    if process.returncode:
        raise ValueError(f"reasoning-gym makes no entries with {wanted}: {process.stderr.strip().splitlines()[-1:]}")
    found = json.loads(process.stdout.splitlines()[-1])
    if isinstance(found, list):
        return [(entry, scores) for entry, scores in found]
    if "refused" in found:
        raise ValueError(f"{path!r} with settings = {source.get('settings', {})}: {found['refused']}; mend them")
    raise ValueError(f"the entries of {path!r} cannot be kept as JSON ({found['unkept']}); choose another task")


def _row(source: Mapping[str, Any], entry: Mapping[str, Any], scores: list[float]) -> dict[str, Any]:
    spec: dict[str, Any] = {"id": VERIFIER} | dict(source.get("verifier", {}))
    if spec["id"] == VERIFIER:
        spec = {"threshold": 0.99} | spec | {"entry": entry}
        if source.get("settings"):
            spec["settings"] = source["settings"]
        _check_round_trip(entry, scores, str(source["path"]))
    return {
        "prompt": entry["question"],
        "ground_truth": entry["answer"],
        "data_source": source.get("data_source", source["path"]),
        "verifier": canonical(spec),
    }


def _check_round_trip(entry: Mapping[str, Any], scores: list[float], path: str) -> None:
    """Refuse a task that scores its own answer differently once the entry went through JSON."""
    if entry["answer"] is None:
        raise ValueError(f"{path!r} makes entries without an answer; choose a task that has one")
    before, after = scores
    if before != after:
        raise ValueError(f"{path!r} scores its own answer {before}, but {after} once kept as JSON; choose another task")
