"""The nouns: frozen columns of equal length, one row a prompt or a rollout, joined by ``prompt_uid`` only.

A record is plain data. Nothing here opens a file, and nothing is ever joined on prompt text or on a row's position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from pipeline.messages import identity

VERDICTS = ("correct", "incorrect", "unscorable", "error", "timeout", "truncated")
"""What a verifier can say of one completion. Only the first two move a belief."""

REASONS = ("selected", "budget", "unseen", "no_signal", "prior", "duplicate", "contaminated", "error")
"""Why a prompt is, or is not, in a stage: exactly one code for every prompt of the pool.

``unseen``: no rollout of this prompt is stored yet; ``no_signal``: its stored rollouts all agree, so its gradient is
zero; ``prior``: the free first filter left it out; ``budget``: scored, but others scored higher.
"""


class Columns:
    """Equal-length columns with row selection and concatenation; subclasses are frozen dataclasses of tuples."""

    def __post_init__(self) -> None:
        """Refuse columns of unequal length, naming them."""
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}  # type: ignore[arg-type]
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of {type(self).__name__} have unequal lengths: {lengths}")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    def columns(self) -> dict[str, tuple[Any, ...]]:
        """Return the columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def of(cls, columns: Mapping[str, Iterable[Any]]) -> Self:
        """Build from a mapping that has at least this record's columns.

        Raises:
            ValueError: a column is missing; the message names it.
        """
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        missing = [name for name in names if name not in columns]
        if missing:
            raise ValueError(f"{cls.__name__} needs column(s) {missing}; got {sorted(columns)}")
        return cls(**{name: tuple(columns[name]) for name in names})

    def take(self, index: Sequence[int] | np.ndarray) -> Self:
        """Return the rows at ``index``, in that order."""
        rows = [int(i) for i in index]
        return type(self)(**{name: tuple(column[i] for i in rows) for name, column in self.columns().items()})

    @classmethod
    def concat(cls, parts: Iterable[Self]) -> Self:
        """Return the rows of all ``parts``, in order."""
        parts = list(parts)
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        return cls(**{name: tuple(v for part in parts for v in getattr(part, name)) for name in names})


@dataclass(frozen=True)
class Prompts(Columns):
    """Prompts with a verifiable answer, one row a prompt.

    Attributes:
        prompt_uid: hash of (messages, ground truth, data source); see ``prompt_uid``.
        messages: canonical JSON of the list of ``{"role", "content"}`` messages; content is text or parts, see
            ``pipeline.messages``.
        ground_truth: the answer that the verifier compares with.
        data_source: the set that the prompt came from.
        ability: family or skill label; used for reporting only, never for selection.
        verifier: canonical JSON, ``{"id": ..., ...}``: which verifier scores completions, and its arguments.
    """

    prompt_uid: tuple[str, ...]
    messages: tuple[str, ...]
    ground_truth: tuple[str, ...]
    data_source: tuple[str, ...]
    ability: tuple[str, ...]
    verifier: tuple[str, ...]

    def rows_of(self, uids: Iterable[str]) -> list[int]:
        """Return the row of each uid, in the order asked for.

        Raises:
            KeyError: a uid is not among these prompts; the message names it.
        """
        row = {uid: i for i, uid in enumerate(self.prompt_uid)}
        uids = list(uids)
        missing = [uid for uid in uids if uid not in row]
        if missing:
            raise KeyError(f"{len(missing)} prompt_uid(s) are not among these {len(self)} prompts, first: {missing[0]}")
        return [row[uid] for uid in uids]


@dataclass(frozen=True)
class Rollouts(Columns):
    """Scored completions, one row a completion.

    Attributes:
        prompt_uid: the prompt that was completed.
        sample: index of the completion within its group.
        policy: key of the checkpoint that sampled it.
        step: optimizer step of that policy within its run; 0 for a rollout that was collected before training.
        prompt_ids: token ids of the prompt, as the policy saw them.
        completion_ids: token ids of the completion, the end token included where it was sampled.
        logp_old: log-probability of each completion token under the sampling distribution that was used [nats].
        temperature: the temperature of that distribution.
        finish_reason: ``stop`` or ``length``.
        seed: the seed of the draw; with (prompt_uid, sample) it repeats it.
        text: the decoded completion, without special tokens.
        reward: the verifier's reward; 0 where it gave none.
        verdict: one of ``VERDICTS``.
    """

    prompt_uid: tuple[str, ...]
    sample: tuple[int, ...]
    policy: tuple[str, ...]
    step: tuple[int, ...]
    prompt_ids: tuple[Sequence[int], ...]
    completion_ids: tuple[Sequence[int], ...]
    logp_old: tuple[Sequence[float], ...]
    temperature: tuple[float, ...]
    finish_reason: tuple[str, ...]
    seed: tuple[int, ...]
    text: tuple[str, ...]
    reward: tuple[float, ...]
    verdict: tuple[str, ...]

    def groups(self) -> dict[str, list[int]]:
        """Return the rows of each prompt, in order of first appearance."""
        rows: dict[str, list[int]] = {}
        for i, uid in enumerate(self.prompt_uid):
            rows.setdefault(uid, []).append(i)
        return rows


def canonical(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def prompt_uid(messages: str, ground_truth: str, data_source: str) -> str:
    """Return the identity of a prompt: 32 hexadecimal digits of SHA-256 over what makes it that prompt.

    An image whose bytes were at hand counts by their digest, another one by its URL; see ``pipeline.messages``.
    """
    return hashlib.sha256(canonical([identity(messages), ground_truth, data_source]).encode()).hexdigest()[:32]


def keyed_seed(*identity: Any) -> int:
    """Return a 63-bit seed that depends on ``identity`` alone: randomness follows the thing, not its position."""
    return int.from_bytes(hashlib.sha256(canonical(list(identity)).encode()).digest()[:8], "big") >> 1
