r"""DIEM: weights for the samples of a minibatch from their alignment with a reference gradient.

Tan et al. 2026, arXiv:2608.29252 (CVPR 2026), in the form that satisfies its own constraint.

    max_W  I.W   subject to  |W^T G| = |1^T G|            P = G G^T,  I = G g_ref,  C = 1^T P 1
    v = (P + eps Id)^-1 I                                  eps = ridge * trace(P) / N
    W = max(0, v),  then scaled so that W^T P W = C

G      gradients of the minibatch, one row a prompt            (prompts, dim)
g_ref  reference gradient                                       (dim,)
With g_ref = 1^T G and ridge = 0, as printed, P^-1 I = 1 and W = 1 exactly, whatever the batch: the literal rule is
plain GRPO. What the weights do comes from the reference and the ridge.
Departures: (1) the reference is an argument; (2) the ridge is relative, because an absolute one depends on the scale of
the gradients; (3) samples without gradient leave the solve and keep weight one; (4) the norm is restored after the
clip, not before; (5) ``temper`` mixes the weights with one: at full strength four of eleven prompts carry the step and
whole runs lose to plain GRPO; (6) arXiv v1 prints the two square roots swapped, which violates the constraint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pipeline.advantages import effective_sample_size

REVISION = 1


@dataclass(frozen=True)
class Diagnostics:
    """What the weights did to one step; logged at every step, so that a silent no-op is visible.

    Attributes:
        deviation: max |W - 1|.
        negatives: samples that the clip set to zero.
        effective_samples: Kish's effective number of the samples that have a gradient.
        cosine_to_plain: cosine between the weighted and the plain update.
        condition: condition number of the damped Gram matrix.
        identity: whether the weights are one to within 1e-6, so that the step is plain GRPO.
    """

    deviation: float
    negatives: int
    effective_samples: float
    cosine_to_plain: float
    condition: float
    identity: bool


def diem_weights(
    gram: Float[np.ndarray, "prompts prompts"],
    importance: Float[np.ndarray, " prompts"],
    *,
    ridge: float = 0.0,
    clip: bool = True,
) -> Float[np.ndarray, " prompts"]:
    """Return W.

    Args:
        gram: P, inner products of the gradients.
        importance: I, inner product of each gradient with the reference; its scale cancels.
        ridge: damping relative to the mean diagonal of P.
        clip: set negative weights to zero.

    Raises:
        ValueError: shapes disagree, a value is not finite, or ``ridge`` is negative.
    """
    P, importance = np.asarray(gram, np.float64), np.asarray(importance, np.float64)
    if P.shape != (len(importance), len(importance)):
        raise ValueError(f"gram is {P.shape} but importance has {len(importance)} entries")
    if not (np.isfinite(P).all() and np.isfinite(importance).all()):
        raise ValueError("gram or importance holds NaN or infinity; look for the sample whose gradient is not finite")
    if ridge < 0:
        raise ValueError(f"ridge = {ridge}: must not be negative; 0.1 is the working default")
    W = np.ones(len(importance))
    active = np.diag(P) > 0
    if not active.any():
        return W
    P, importance = P[np.ix_(active, active)], importance[active]
    v = _solve(P, importance, ridge)
    v = np.maximum(v, 0.0) if clip else v
    norm = float(v @ P @ v)
    if norm <= 0:  # nothing in the batch points with the reference: leave the step as it is
        return W
    W[active] = v * np.sqrt(P.sum() / norm)
    return W


def temper(weights: Float[np.ndarray, " prompts"], strength: float) -> Float[np.ndarray, " prompts"]:
    """Return (1 - a) + a W, a = ``strength``: 0 is plain GRPO, 1 the full weights."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength = {strength}: a share in [0, 1]; 0.25 is the working default")
    return (1 - strength) + strength * weights


def diagnose(
    gram: Float[np.ndarray, "prompts prompts"],
    raw: Float[np.ndarray, " prompts"],
    used: Float[np.ndarray, " prompts"],
    *,
    ridge: float,
) -> Diagnostics:
    """Describe the weights ``used`` in a step, and the ``raw`` ones that they were tempered from."""
    P = np.asarray(gram, np.float64)
    active = np.diag(P) > 0
    P = P[np.ix_(active, active)]
    w, one = used[active], np.ones(int(active.sum()))
    plain, weighted = float(one @ P @ one), float(w @ P @ w)
    cosine = float(one @ P @ w) / np.sqrt(plain * weighted) if plain > 0 and weighted > 0 else 1.0
    spectrum = np.linalg.eigvalsh(P + _damping(P, ridge)) if len(P) else np.ones(1)
    condition = float(spectrum[-1] / max(spectrum[0], np.finfo(float).tiny))
    return Diagnostics(
        deviation=float(np.abs(used - 1).max(initial=0.0)),
        negatives=int((raw[active] <= 0).sum()),
        effective_samples=effective_sample_size(w),
        cosine_to_plain=float(cosine),
        condition=condition,
        identity=bool(np.abs(used - 1).max(initial=0.0) < 1e-6),
    )


def _damping(P: np.ndarray, ridge: float) -> np.ndarray:
    return ridge * np.trace(P) / len(P) * np.eye(len(P))


def _solve(P: np.ndarray, importance: np.ndarray, ridge: float) -> np.ndarray:
    if ridge > 0:
        return np.linalg.solve(P + _damping(P, ridge), importance)
    return np.linalg.lstsq(P, importance, rcond=None)[0]  # duplicated prompts make P singular: least norm
