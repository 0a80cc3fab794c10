r"""Beta beliefs over a prompt's success rate, and what the next rollouts would tell.

InSight, arXiv:2603.01907, eq. 3-6 and 11-13.

    phi ~ Beta(alpha, beta)                  R_1..R_K | phi ~ Bernoulli(phi),  S = sum R
    H(a, b) = lnB(a, b) + (a + b - 2) psi(a + b) - (a - 1) psi(a) - (b - 1) psi(b)
    p_s = C(K, s) B(alpha + s, beta + K - s) / B(alpha, beta)
    I(R_1:K; phi) = H(alpha, beta) - sum_s p_s H(alpha + s, beta + K - s)              [nats]

    alpha <- lambda alpha + (1 - lambda) alpha_0 + S
    beta  <- lambda beta  + (1 - lambda) beta_0  + K - S        for a prompt that was rolled out, only

S is sufficient for R_1:K, so I is also the information in the count. Limits: I ~ ln(1 + K / n) / 2 for interior means,
n = alpha + beta. The entropy form is used because the other closed form loses 1e-5 at n = 1e6 to cancellation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.special import betaln, digamma, gammaln

BLOCK = 1 << 16  # beliefs at a time


def entropy(alpha: Float[np.ndarray, "*n"], beta: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Return the differential entropy of Beta(alpha, beta) in nats."""
    total = alpha + beta
    return (
        betaln(alpha, beta) + (total - 2) * digamma(total) - (alpha - 1) * digamma(alpha) - (beta - 1) * digamma(beta)
    )


def predictive(
    alpha: Float[np.ndarray, " prompts"], beta: Float[np.ndarray, " prompts"], rollouts: int
) -> Float[np.ndarray, "prompts counts"]:
    """Return the beta-binomial chance of s = 0..rollouts successes, one row a prompt, each summing to one."""
    s = np.arange(rollouts + 1)
    log_choose = gammaln(rollouts + 1) - gammaln(s + 1) - gammaln(rollouts - s + 1)
    log_p = log_choose + betaln(alpha[:, None] + s, beta[:, None] + rollouts - s) - betaln(alpha, beta)[:, None]
    p = np.exp(log_p)
    return p / p.sum(axis=1, keepdims=True)


def mutual_information(
    alpha: Float[np.ndarray, " prompts"], beta: Float[np.ndarray, " prompts"], rollouts: int
) -> Float[np.ndarray, " prompts"]:
    """Return I(R_1:K; phi) in nats for K = ``rollouts``, clamped at zero against rounding.

    Raises:
        ValueError: a count is not positive, or ``rollouts`` is below one.
    """
    alpha, beta = np.asarray(alpha, float), np.asarray(beta, float)
    if rollouts < 1:
        raise ValueError(f"rollouts = {rollouts}: at least one planned rollout is needed")
    if alpha.size and not (np.all(alpha > 0) and np.all(beta > 0)):
        raise ValueError(f"alpha and beta must be positive; smallest are {alpha.min()} and {beta.min()}")
    if len(alpha) > BLOCK:  # whole counts make few different beliefs
        pairs, where = np.unique(alpha + 1j * beta, return_inverse=True)
        parts = np.split(pairs, range(BLOCK, len(pairs), BLOCK))
        return np.concatenate([mutual_information(part.real, part.imag, rollouts) for part in parts])[where]
    s = np.arange(rollouts + 1)
    after = entropy(alpha[:, None] + s, beta[:, None] + rollouts - s)
    return np.maximum(entropy(alpha, beta) - (predictive(alpha, beta, rollouts) * after).sum(axis=1), 0.0)


def update(
    alpha: Float[np.ndarray, " prompts"],
    beta: Float[np.ndarray, " prompts"],
    successes: Float[np.ndarray, " prompts"],
    failures: Float[np.ndarray, " prompts"],
    *,
    discount: float = 1.0,
    prior: tuple[float, float] = (1.0, 1.0),
) -> tuple[Float[np.ndarray, " prompts"], Float[np.ndarray, " prompts"]]:
    """Return the belief after one visit (eq. 5-6); a prompt with no counted rollout keeps its belief."""
    visited = (successes + failures) > 0
    new_alpha = discount * alpha + (1 - discount) * prior[0] + successes
    new_beta = discount * beta + (1 - discount) * prior[1] + failures
    return np.where(visited, new_alpha, alpha), np.where(visited, new_beta, beta)


def from_history(
    uids: Sequence[str],
    history: Mapping[str, Sequence[tuple[int, int]]],
    *,
    discount: float = 1.0,
    prior: tuple[float, float] = (1.0, 1.0),
    strength: float = 1.0,
    informative: int = 0,
) -> tuple[Float[np.ndarray, " prompts"], Float[np.ndarray, " prompts"]]:
    """Fold each prompt's recorded visits into its belief, oldest first.

    Args:
        uids: prompts to report on; a prompt without history keeps the prior.
        history: for each prompt its visits, as (successes, failures), in the order in which they were recorded.
        discount: lambda, applied at each later visit of that prompt; 1 is the published value.
        prior: (alpha_0, beta_0).
        strength: what a count of the first ``informative`` visits weighs: rollouts that were collected before
            training make the prior informative, and are staler than those made in training.
        informative: how many leading visits of each prompt are such collected rollouts.

    Returns:
        alpha and beta, one value a prompt.
    """
    visits = [(row, *visit) for row, uid in enumerate(uids) for visit in history.get(uid, ())]
    rows, successes, failures = np.array(visits, int).reshape(-1, 3).T
    return from_visits(
        len(uids),
        rows,
        successes,
        failures,
        discount=discount,
        prior=prior,
        strength=strength,
        informative=informative,
    )


def from_visits(
    prompts: int,
    rows: Int[np.ndarray, " visits"],
    successes: Int[np.ndarray, " visits"],
    failures: Int[np.ndarray, " visits"],
    *,
    discount: float = 1.0,
    prior: tuple[float, float] = (1.0, 1.0),
    strength: float = 1.0,
    informative: int = 0,
) -> tuple[Float[np.ndarray, " prompts"], Float[np.ndarray, " prompts"]]:
    """Return the same from columns: one entry a visit of prompt ``rows``, the visits of a prompt oldest first."""
    alpha, beta = np.full(prompts, float(prior[0])), np.full(prompts, float(prior[1]))
    order = np.argsort(rows, kind="stable")
    first = np.flatnonzero(np.diff(rows[order], prepend=-1))
    visit = np.arange(len(rows)) - np.repeat(first, np.diff([*first, len(rows)]))  # of its prompt, from 0
    turns = np.argsort(visit, kind="stable")
    for number, at in enumerate(np.split(order[turns], np.flatnonzero(np.diff(visit[turns])) + 1)):
        at = at[successes[at] + failures[at] > 0]
        row, good, bad = rows[at], successes[at], failures[at]
        if number < informative:
            alpha[row] += strength * good
            beta[row] += strength * bad
        else:
            alpha[row] = discount * alpha[row] + (1 - discount) * prior[0] + good
            beta[row] = discount * beta[row] + (1 - discount) * prior[1] + bad
    return alpha, beta
