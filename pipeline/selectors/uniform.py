"""Uniform: a random order of the pool, keyed by identity. The control that every selector is compared with.

    s_i = u(seed, prompt_uid_i)             u uniform on [0, 1), a hash of its arguments

Reordering or sharding the pool changes no score, and a larger budget selects a superset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from pipeline.records import canonical

REVISION = 1
_BLOCK = 1 << 16


def score(prompt_uid: Sequence[str] | pa.Array, *, seed: int = 0) -> Float[np.ndarray, " prompts"]:
    """Return one uniform number a prompt, a function of (seed, prompt_uid) alone.

    It is ``pipeline.records.keyed_seed("uniform", seed, prompt_uid)`` over 2^63; the ids may be an Arrow column.
    """
    out, start = np.empty(len(prompt_uid)), canonical(["uniform", seed])[:-1] + ","
    begun = hashlib.sha256(start.encode())
    for first, uids in _blocks(prompt_uid):
        digests = []
        for uid in uids:
            digest = begun.copy()
            digest.update(f"{canonical(uid)}]".encode())
            digests.append(digest.digest()[:8])
        out[first : first + len(uids)] = np.frombuffer(b"".join(digests), ">u8") >> 1
    out /= 2.0**63
    return out


def _blocks(uids: Sequence[str] | pa.Array) -> Iterator[tuple[int, list[str]]]:
    for first in range(0, len(uids), _BLOCK):
        block = uids[first : first + _BLOCK]
        yield first, block.to_pylist() if isinstance(block, pa.Array) else list(block)
