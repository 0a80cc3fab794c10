"""Which verifier, in which version, gave a verdict; and other verdicts for rollouts that are stored already.

A version is that of our own function (``REVISIONS``), of the library behind it, or of a user's file. It goes into the
keys of all that rests on verdicts, so that another version is another result and never mixes with the old one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.records import Prompts, Rollouts
from pipeline.rollouts import Score, cut_off
from pipeline.verifiers import known_id

REVISIONS = {"exact": 1, "numeric": 1, "math-verify": 1, "reasoning-gym": 1, "python": 1}
"""Raised by one whenever ``pipeline.verifiers`` changes what a verifier answers."""

LIBRARIES = {"math-verify": ("math-verify", "latex2sympy2_extended", "sympy"), "reasoning-gym": ("reasoning_gym",)}
"""Distributions whose version can change a verdict."""


def versions(specs: Iterable[str]) -> dict[str, str]:
    """Return the version of each verifier that some specs name.

    A ``python`` verifier is named by its function, and its version is a digest of the file that the function is in;
    what that file imports is not seen.

    Args:
        specs: verifier specs as JSON.

    Example:
        >>> versions(['{"id":"exact"}'])
        {'exact': '1'}
    """
    found = {}
    for text in sorted(set(specs)):
        spec = json.loads(text)
        name = known_id(spec)
        parts = [str(REVISIONS[name]), *(f"{lib} {importlib.metadata.version(lib)}" for lib in LIBRARIES.get(name, ()))]
        if name == "python":
            name, parts = f"python {spec.get('function')}", [*parts, _digest(spec)]
        found[name] = ", ".join(parts)
    return found


def rescore(rollouts: Rollouts, prompts: Prompts, score: Score) -> Rollouts:
    """Return the same rollouts with the rewards and verdicts that their prompts' verifiers give now.

    Args:
        rollouts: stored rollouts, each with its text.
        prompts: what they were asked, with the verifiers to use.
        score: the verifiers.

    Raises:
        KeyError: a rollout belongs to none of the prompts.
        ValueError: a rollout has tokens and no text, so that there is nothing to score.
    """
    for i, text in enumerate(rollouts.text):
        if not text and len(rollouts.completion_ids[i]) > 1:  # one token may be the end token alone
            raise ValueError(
                f"rollout {rollouts.sample[i]} of prompt {rollouts.prompt_uid[i]} has "
                f"{len(rollouts.completion_ids[i])} tokens and no text: import it with its text to score it again"
            )
    rows = prompts.rows_of(rollouts.prompt_uid)
    verdicts = score(
        [(prompts.verifier[i], prompts.ground_truth[i], t) for i, t in zip(rows, rollouts.text, strict=True)]
    )
    return replace(
        rollouts,
        reward=tuple(float(v.reward) for v in verdicts),
        verdict=tuple(cut_off(v.verdict, why) for v, why in zip(verdicts, rollouts.finish_reason, strict=True)),
    )


def changes(before: Rollouts, after: Rollouts) -> dict[str, int]:
    """Return how many rollouts went from one verdict to another, such as ``{"incorrect -> correct": 3}``."""
    pairs = zip(before.verdict, after.verdict, strict=True)
    return dict(sorted(Counter(f"{old} -> {new}" for old, new in pairs if old != new).items()))


def _digest(spec: Mapping[str, Any]) -> str:
    """Return a digest of the file that holds the function of a ``python`` verifier; nothing where there is none."""
    found = importlib.util.find_spec(str(spec.get("function")).partition(":")[0])
    if found is None or not found.origin or not Path(found.origin).is_file():
        return ""
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:16]
