r"""InSight: weighted mutual information between the next K outcomes and a prompt's success rate.

arXiv:2603.01907, eq. 13 and 15-17.

    A = w(m) I(R_1:K; phi)                phi ~ Beta(alpha, beta),  m = alpha / (alpha + beta)
    w(m) = m (1 - m) exp(-eta (m - mu)^2)

alpha, beta  belief before the step     (prompts,)
The factor m (1 - m) moves the peak of w from mu = 0.3 to m = 0.416. With uniform priors every unseen prompt beats every
seen one, so on a pool larger than batch x steps the rule equals a shuffle: give it a prior from stored rollouts.
Departures: (1) mu = 0.3; the appendix prints 3.0, which contradicts the paper's own tables and is refused here.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from pipeline.beliefs import mutual_information

REVISION = 1


def difficulty_weight(mean: Float[np.ndarray, " prompts"], *, mu: float, eta: float) -> Float[np.ndarray, " prompts"]:
    """Return w(m), the taste for prompts of middling difficulty (eq. 15).

    Raises:
        ValueError: ``mu`` is not a success rate, or ``eta`` is negative.
    """
    if not 0.0 <= mu <= 1.0:
        raise ValueError(f"mu = {mu}: a success rate lies in [0, 1]; the published setting is 0.3")
    if eta < 0.0:
        raise ValueError(f"eta = {eta}: must not be negative; the published setting is 3.0")
    return mean * (1 - mean) * np.exp(-eta * (mean - mu) ** 2)


def score(
    alpha: Float[np.ndarray, " prompts"],
    beta: Float[np.ndarray, " prompts"],
    *,
    rollouts: int = 8,
    mu: float = 0.3,
    eta: float = 3.0,
) -> Float[np.ndarray, " prompts"]:
    """Return A for each prompt; higher is worth more rollouts (eq. 16)."""
    alpha, beta = np.asarray(alpha, float), np.asarray(beta, float)
    mean = alpha / (alpha + beta)
    return difficulty_weight(mean, mu=mu, eta=eta) * mutual_information(alpha, beta, rollouts)
