"""Verifiers: functions of (spec, ground truth, completion) that say whether a completion is right.

A spec is a plain mapping, ``{"id": ..., ...}``, that travels with its prompt as canonical JSON (``Prompts.verifier``):

    {"id": "exact"}                                    equal after stripping white space
    {"id": "numeric", "take": "last", "tolerance": 0}  the first or last number of the completion
    {"id": "math-verify"}                              mathematical equality (math_verify)
    {"id": "reasoning-gym", "entry": {...}, "threshold": 0.99, "extract": "none", "settings": {...}}
    {"id": "python", "function": "package.module:function", "threshold": 1.0}

Functions here run in this process and know no time limit; ``pipeline.rewards.VerifierPool`` adds both.
A gold answer that reads ``reasoning #### answer`` (GSM8K) counts as ``answer`` for ``numeric`` and ``math-verify``.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Context, Decimal, localcontext
from functools import lru_cache
from typing import Any

from pipeline.records import canonical

NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)])[-+])?"  # a sign, unless it joins two terms
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"  # 1,234 or 1234 or nothing before the point
    r"(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
)
DELIMITERS = ("$", "\\boxed", "\\(", "\\[")
EXTRACTS = ("none", "first_line", "answer_tags")
SPEC_KEYS = {
    "exact": (),
    "numeric": ("take", "tolerance"),
    "math-verify": (),
    "reasoning-gym": ("entry", "threshold", "extract", "settings"),
    "python": ("function", "threshold"),
}
"""Known verifier ids, and the keys that each one reads besides ``id``; ``python`` takes any key its user likes."""


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one completion: one of ``records.VERDICTS``, and a reward (0 where it gave none)."""

    verdict: str
    reward: float


INCORRECT = Verdict("incorrect", 0.0)
UNSCORABLE = Verdict("unscorable", 0.0)
ERROR = Verdict("error", 0.0)
TIMEOUT = Verdict("timeout", 0.0)


def verify(spec: Mapping[str, Any], ground_truth: str, completion: str) -> Verdict:
    r"""Score one completion in this process, without a time limit.

    Args:
        spec: the verifier and its arguments; see the module docstring.
        ground_truth: the answer to compare with.
        completion: the text that the policy wrote.

    Returns:
        ``correct`` or ``incorrect``; ``unscorable`` if the ground truth cannot be compared with; ``error`` if the
        verifier raised.

    Raises:
        ValueError: no verifier has this id.

    Example:
        >>> verify({"id": "exact"}, "4", " 4\n")
        Verdict(verdict='correct', reward=1.0)
    """
    verifier = _VERIFIERS[known_id(spec)]
    try:
        return verifier(spec, ground_truth, completion)
    except (Exception, SystemExit):
        # The one broad except: a verifier may be anybody's code and raise anything, and its failure is a fact about
        # this completion ("error", which moves no belief), not a reason to lose all other rollouts of the run.
        return ERROR


def known_id(spec: Mapping[str, Any]) -> str:
    """Return the verifier id of ``spec``, or raise ValueError naming it and the known ids."""
    name = spec.get("id") if isinstance(spec, Mapping) else None
    if name not in SPEC_KEYS:
        raise ValueError(
            f"verifier id {name!r} in spec {str(spec)[:200]} is unknown; use one of {sorted(SPEC_KEYS)}, "
            'or {"id": "python", "function": "package.module:function"} for your own'
        )
    return str(name)


def resolve(function: Any) -> Callable[..., Any]:
    """Return the function that ``package.module:function`` names.

    Raises:
        ValueError: it is no such path, or nothing callable is there.
    """
    module, _, attribute = str(function).partition(":")
    if not module or not attribute:
        raise ValueError(f"function = {function!r} of verifier 'python' must read 'package.module:function'")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as err:
        raise ValueError(
            f"function = {function!r} of verifier 'python' cannot be imported: {err}; put it on PYTHONPATH"
        ) from err
    if not callable(found):
        raise ValueError(f"function = {function!r} of verifier 'python' is a {type(found).__name__}, not a function")
    return found


def gold_completion(spec: Mapping[str, Any], ground_truth: str) -> str:
    """Return the completion that a perfect policy would write: the gold answer in the form that the verifier reads."""
    name = known_id(spec)
    if name == "reasoning-gym":
        answer = str(spec["entry"]["answer"])
        return f"<answer>{answer}</answer>" if spec.get("extract") == "answer_tags" else answer
    if name == "math-verify":
        return _delimited(ground_truth)
    return _after_hashes(ground_truth) if name == "numeric" else ground_truth


def score_reasoning_gym(spec: Mapping[str, Any], answer: str) -> float:
    """Return the task's own score of ``answer`` for ``spec["entry"]``, in [0, 1]."""
    return float(
        _reasoning_gym_scorer(task_of(spec), canonical(spec.get("settings") or {}))(answer=answer, entry=spec["entry"])
    )


def task_of(spec: Mapping[str, Any]) -> str:
    """Return the reasoning-gym task that made the entry of ``spec``, or nothing."""
    entry = spec.get("entry")
    metadata = entry.get("metadata") if isinstance(entry, Mapping) else None
    return str(metadata.get("source_dataset") or "") if isinstance(metadata, Mapping) else ""


def _exact(_spec: Mapping[str, Any], ground_truth: str, completion: str) -> Verdict:
    return _binary(completion.strip() == ground_truth.strip())


def _numeric(spec: Mapping[str, Any], ground_truth: str, completion: str) -> Verdict:
    gold_text = _after_hashes(ground_truth).strip("$% ").removesuffix(".").replace("\u2212", "-")
    gold = _decimal(gold_text) if NUMBER.fullmatch(gold_text) else None
    if gold is None:
        return UNSCORABLE
    numbers = NUMBER.findall(completion.replace("\u2212", "-"))
    found = _decimal(numbers[0 if spec.get("take", "last") == "first" else -1]) if numbers else None
    if found is None:
        return INCORRECT
    # No trap is set: 1e999999999 overflows the subtraction to infinity, which is not within any tolerance.
    with localcontext(Context(prec=50, traps=[])):
        return _binary(found == gold or abs(found - gold) <= Decimal(str(spec.get("tolerance", 0.0))))


def _math_verify(_spec: Mapping[str, Any], ground_truth: str, completion: str) -> Verdict:
    import math_verify

    # Its only messages are about the time limits that we switch off: they use signal.alarm, hence the main thread
    # only; the pool has a harder limit.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    gold = math_verify.parse(_delimited(ground_truth), parsing_timeout=None)
    # Words parse as products of letters ("yes" = s*y*e); without a digit or a command they are no mathematics.
    words = re.search(r"[A-Za-z]{3}", ground_truth) and not re.search(r"[0-9\\]", ground_truth)
    if words or all(isinstance(item, str) for item in gold):
        return UNSCORABLE
    return _binary(math_verify.verify(gold, math_verify.parse(completion, parsing_timeout=None), timeout_seconds=None))


def _reasoning_gym(spec: Mapping[str, Any], _ground_truth: str, completion: str) -> Verdict:
    answer = _extract(completion, str(spec.get("extract", "none")))
    # Binary on purpose: many tasks give partial credit or a floor above zero to wrong answers.
    return _binary(answer is not None and score_reasoning_gym(spec, answer) >= spec.get("threshold", 0.99))


def _python(spec: Mapping[str, Any], ground_truth: str, completion: str) -> Verdict:
    result = resolve(spec.get("function"))(completion, ground_truth, spec)
    if result is None:
        return UNSCORABLE
    reward = float(result)
    if not math.isfinite(reward):
        raise ValueError(f"verifier {spec['function']} returned {reward}; return a bool, a finite float or None")
    return Verdict("correct" if reward >= spec.get("threshold", 1.0) else "incorrect", reward)


_VERIFIERS = {
    "exact": _exact,
    "numeric": _numeric,
    "math-verify": _math_verify,
    "reasoning-gym": _reasoning_gym,
    "python": _python,
}


def _binary(right: bool) -> Verdict:
    return Verdict("correct", 1.0) if right else INCORRECT


def _decimal(text: str) -> Decimal | None:
    """Return ``text`` as an exact number, or None if its exponent is beyond what a Decimal can hold."""
    with localcontext(Context(traps=[])):
        number = Decimal(text.replace(",", ""))
    return number if number.is_finite() else None


def _after_hashes(ground_truth: str) -> str:
    return ground_truth.rpartition("####")[2].strip()


def _delimited(ground_truth: str) -> str:
    r"""Return the gold answer as LaTeX: left bare, math_verify would read ``3\pi`` as 3."""
    gold = _after_hashes(ground_truth)
    return gold if not gold or any(mark in gold for mark in DELIMITERS) else f"\\boxed{{{gold}}}"


def _extract(completion: str, how: str) -> str | None:
    if how == "first_line":
        return next((line.strip() for line in completion.splitlines() if line.strip()), None)
    if how == "answer_tags":
        found = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
        return found[-1].strip() if found else None
    return completion.strip()


@lru_cache(maxsize=64)
def _reasoning_gym_scorer(task: str, settings: str) -> Callable[..., float]:
    import reasoning_gym

    # Some tasks score by their settings (puzzle24, time_intervals), so the scorer is made with those of the entry.
    scorer: Callable[..., float] = reasoning_gym.create_dataset(
        task, size=1, seed=0, **json.loads(settings)
    ).score_answer
    return scorer
