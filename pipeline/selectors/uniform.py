"""Uniform: a random order of the pool, keyed by identity. The control that every selector is compared with.

    s_i = u(seed, prompt_uid_i)             u uniform on [0, 1), a hash of its arguments

Reordering or sharding the pool changes no score, and a larger budget selects a superset.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from pipeline.records import keyed_seed

REVISION = 1


def score(prompt_uid: Sequence[str], *, seed: int = 0) -> Float[np.ndarray, " prompts"]:
    """Return one uniform number a prompt, a function of (seed, prompt_uid) alone."""
    return np.array([keyed_seed("uniform", seed, uid) / 2.0**63 for uid in prompt_uid])
