r"""CROPI: influence of each prompt on the validation sets, from stored rollouts.

arXiv:2510.26491, practical score (POPI) and fusion of the released pipeline.

    c_ij = cos(z_i, v_j)                    F_i = sum_j [r_ij <= n] / r_ij

z_i   projected off-policy policy gradient of prompt i          (prompts, dim)
v_j   mean, not normalised, of the same over validation set j   (targets, dim)
r_ij  rank of prompt i for target j, best first;  n = the budget
A prompt whose rollouts all agree has z_i = 0; it has no direction and must not be passed in.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from pipeline.influence import cosine

REVISION = 1


def score(
    features: Float[np.ndarray, "prompts dim"], targets: Float[np.ndarray, "targets dim"]
) -> Float[np.ndarray, "prompts targets"]:
    """Return c, the cosine of each prompt's gradient with each target's mean gradient."""
    return cosine(features, targets)
