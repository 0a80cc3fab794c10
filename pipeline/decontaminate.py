"""Duplicates inside a pool, and prompts that a held-out set contains too.

Two prompts are the same if their text is, after NFKC, case folding and collapsing white space; instructions in system
messages do not count. What is kept follows from prompt identities, so reordering the pool changes nothing.

``near`` adds prompts whose character 5-grams have at least that cosine. It is off by default: prompts that are made
from one template ("What is 12 + 30?") are near each other without being duplicates. Prompts with other images are
never near: a question is asked of many pictures.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.messages import images_of, plain_text
from pipeline.records import Prompts

BLOCK = 256
"""Prompts compared at once: the product of a block with a pool is the largest array that ``near`` makes."""


def normalised(messages: str) -> str:
    """Return the text of a prompt by which two prompts are the same.

    Args:
        messages: canonical JSON of the messages.
    """
    turns: list[dict[str, Any]] = json.loads(messages)
    said = [plain_text(turn["content"]) for turn in turns if turn["role"] != "system"]
    said = said or [plain_text(turn["content"]) for turn in turns]
    return " ".join(unicodedata.normalize("NFKC", "\n".join(said)).casefold().split())


def drop_repeats(pool: Prompts) -> tuple[Prompts, int]:
    """Keep one row a ``prompt_uid``, and count the rows dropped.

    Rows with one uid can differ in verifier or ability only; the smallest of these is kept, wherever it stands.
    """
    best: dict[str, int] = {}
    for row, uid in enumerate(pool.prompt_uid):
        if uid not in best or _spec(pool, row) < _spec(pool, best[uid]):
            best[uid] = row
    kept = sorted(best.values())
    return pool.take(kept), len(pool) - len(kept)


def find_duplicates(pool: Prompts, near: float | None = None) -> dict[str, str]:
    """Return each prompt that repeats another one, with the prompt that is kept in its place.

    Args:
        pool: the prompts.
        near: also count a cosine of character 5-grams from this value on as a repeat, in (0, 1].

    Returns:
        prompt_uid -> prompt_uid of the kept prompt, which has the smallest uid of its group.
    """
    texts = {uid: normalised(text) for uid, text in sorted(zip(pool.prompt_uid, pool.messages, strict=True))}
    first: dict[str, str] = {}
    for uid, text in texts.items():
        first.setdefault(text, uid)
    repeats = {uid: first[text] for uid, text in texts.items() if first[text] != uid}
    if near is not None:
        seen = {uid: pictures(text) for uid, text in zip(pool.prompt_uid, pool.messages, strict=True)}
        nearest = _near_repeats([uid for uid in texts if uid not in repeats], texts, seen, _checked(near))
        repeats = {uid: nearest.get(kept, kept) for uid, kept in repeats.items()} | nearest
    return dict(sorted(repeats.items()))


def find_contaminated(pool: Prompts, held_out: Mapping[str, Prompts], near: float | None = None) -> dict[str, str]:
    """Return each prompt whose text a held-out set has too, with the name of the (alphabetically first) set.

    Args:
        pool: the prompts.
        held_out: the validation and test sets by name.
        near: also count a cosine of character 5-grams from this value on, in (0, 1].
    """
    texts = {uid: normalised(text) for uid, text in sorted(zip(pool.prompt_uid, pool.messages, strict=True))}
    seen = {uid: pictures(text) for uid, text in zip(pool.prompt_uid, pool.messages, strict=True)}
    found: dict[str, str] = {}
    for name in sorted(held_out):
        theirs = {normalised(text): pictures(text) for text in held_out[name].messages}
        left, there = [uid for uid in texts if uid not in found], sorted(theirs)
        same = {uid for uid in left if texts[uid] in theirs}
        if near is not None and theirs:
            for start, block in _cosines([texts[uid] for uid in left], there):
                rows, columns = (block >= _checked(near)).nonzero()
                pairs = zip((left[start + int(i)] for i in rows), (there[int(j)] for j in columns), strict=True)
                same |= {uid for uid, text in pairs if seen[uid] == theirs[text]}
        found |= dict.fromkeys(same, name)
    return dict(sorted(found.items()))


def pictures(messages: str) -> tuple[str, ...]:
    """Return what identifies each image of a prompt, in order."""
    return tuple(part.get("sha256") or part["image"] for part in images_of(json.loads(messages)))


def _near_repeats(
    uids: Sequence[str], texts: Mapping[str, str], seen: Mapping[str, tuple[str, ...]], near: float
) -> dict[str, str]:
    """Return uid -> the smallest uid that is kept and near it; ``uids`` are sorted, and the first one is kept."""
    repeats: dict[str, str] = {}
    for start, block in _cosines([texts[uid] for uid in uids], [texts[uid] for uid in uids]):
        for i in range(block.shape[0]):
            row = block.getrow(i)
            close = sorted(int(j) for j in row.indices[row.data >= near] if j < start + i)
            mine = seen[uids[start + i]]
            kept = next((uids[j] for j in close if uids[j] not in repeats and seen[uids[j]] == mine), None)
            if kept is not None:
                repeats[uids[start + i]] = kept
    return repeats


def _cosines(left: Sequence[str], right: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Yield (first row, sparse cosines of a block of ``left`` with all of ``right``)."""
    if not left:
        return
    from sklearn.feature_extraction.text import HashingVectorizer

    grams = HashingVectorizer(
        analyzer="char", ngram_range=(5, 5), alternate_sign=False, lowercase=False, dtype=np.float32
    )
    columns = grams.transform(right).T.tocsr()
    for start in range(0, len(left), BLOCK):
        yield start, (grams.transform(left[start : start + BLOCK]) @ columns).tocsr()


def _spec(pool: Prompts, row: int) -> tuple[str, str]:
    return pool.verifier[row], pool.ability[row]


def _checked(near: float) -> float:
    if not 0 < near <= 1:
        raise ValueError(f"near = {near} must be a cosine in (0, 1]; leave it out to compare whole texts only")
    return near - 1e-6  # float32 cosines of equal texts may fall short of 1
