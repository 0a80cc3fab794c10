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
clip, not before; (5) the weights are mixed with one, (1 - a) + a W, because at full strength four of eleven prompts
carry the step and whole runs lose to plain GRPO; ``temper_to_floor`` lowers a where Kish's effective sample size

    ESS = (sum w)^2 / sum w^2,   w = 1 + a (W - 1)
    ESS >= f n   while   a (sqrt(f) sd - sqrt(1 - f) mu) <= sqrt(1 - f)
    mu, sd = mean and standard deviation of W - 1 over the n samples with a gradient

would fall below a share f of the samples; (6) arXiv v1 prints the two square roots swapped, which violates the
constraint. Where the gradient is clipped to a length, the optimizer sees that length whatever the weights are: the norm
constraint then acts on nothing, and ``Diagnostics`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from pipeline.advantages import effective_sample_size
from pipeline.records import keyed_seed

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
        strength: share a of W that is in the weights that were used; 0 where W is one throughout.
        length: length of the weighted update over that of the plain one; tempering shortens it a little.
        norm_acts: whether the length of the update reaches the optimizer; not where the gradient clip shortens both
            the weighted and the plain update to the same length.
    """

    deviation: float
    negatives: int
    effective_samples: float
    cosine_to_plain: float
    condition: float
    identity: bool
    strength: float
    length: float
    norm_acts: bool


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


def temper_to_floor(
    weights: Float[np.ndarray, " prompts"], active: Bool[np.ndarray, " prompts"], strength: float, floor: float
) -> tuple[Float[np.ndarray, " prompts"], float]:
    """Return the weights tempered by the largest a <= ``strength`` that keeps the effective sample size, and that a.

    Args:
        weights: W, none negative.
        active: which prompts have a gradient; the others are not counted, and their weights of one stay one.
        strength: a, where the floor allows it.
        floor: f, the least effective sample size, as a share of the active prompts; 0 is ``temper``.

    Raises:
        ValueError: ``strength`` or ``floor`` is no share, or a weight is negative.
    """
    if not 0.0 <= floor <= 1.0:
        raise ValueError(f"floor = {floor}: a share in [0, 1] of the prompts with a gradient; 0 sets no floor")
    if len(weights) and weights.min() < 0:
        raise ValueError(f"a weight is {weights.min()}: a floor needs weights without sign; clip them at zero first")
    wanted = temper(weights, strength)
    off = weights[active] - 1.0
    if not len(off):
        return wanted, strength
    room = np.sqrt(1.0 - floor)
    steep = float(np.sqrt(floor) * off.std() - room * off.mean())
    if strength * steep <= room:
        return wanted, strength
    return temper(weights, float(room / steep)), float(room / steep)


def permuted(
    weights: Float[np.ndarray, " prompts"], active: Bool[np.ndarray, " prompts"], *seed: object
) -> Float[np.ndarray, " prompts"]:
    """Return the active prompts' weights in a random order keyed by ``seed``: as uneven, and aligned with nothing.

    The control that tells what alignment is worth apart from the concentration that comes with it.
    """
    out = np.array(weights, np.float64)
    out[active] = np.random.default_rng(keyed_seed("permuted weights", *seed)).permutation(out[active])
    return out


def diagnose(
    gram: Float[np.ndarray, "prompts prompts"],
    raw: Float[np.ndarray, " prompts"],
    used: Float[np.ndarray, " prompts"],
    *,
    ridge: float,
    longest: float = np.inf,
) -> Diagnostics:
    """Describe the weights ``used`` in a step, and the ``raw`` ones that they were tempered from.

    Args:
        gram: P, inner products of the gradients.
        raw: W, before it was tempered.
        used: (1 - a) + a W, the weights that the step is taken with.
        ridge: damping relative to the mean diagonal of P.
        longest: length of the summed update beyond which the gradient clip shortens it, in the unit of sqrt(P): the
            clip's norm times the prompts a batch where the update is a mean over the batch.
    """
    P = np.asarray(gram, np.float64)
    active = np.diag(P) > 0
    P = P[np.ix_(active, active)]
    w, one = used[active], np.ones(int(active.sum()))
    plain, weighted = float(one @ P @ one), float(w @ P @ w)
    directed = plain > 0 and weighted > 0
    spectrum = np.linalg.eigvalsh(P + _damping(P, ridge)) if len(P) else np.ones(1)
    condition = float(spectrum[-1] / max(spectrum[0], np.finfo(float).tiny))
    off = raw[active] - 1
    return Diagnostics(
        deviation=float(np.abs(used - 1).max(initial=0.0)),
        negatives=int((raw[active] <= 0).sum()),
        effective_samples=effective_sample_size(w),
        cosine_to_plain=float(one @ P @ w / np.sqrt(plain * weighted)) if directed else 1.0,
        condition=condition,
        identity=bool(np.abs(used - 1).max(initial=0.0) < 1e-6),
        strength=float(off @ (w - 1) / (off @ off)) if off.any() else 0.0,
        length=float(np.sqrt(weighted / plain)) if directed else 1.0,
        norm_acts=min(plain, weighted) < longest**2,
    )


def _damping(P: np.ndarray, ridge: float) -> np.ndarray:
    return ridge * np.trace(P) / len(P) * np.eye(len(P))


def _solve(P: np.ndarray, importance: np.ndarray, ridge: float) -> np.ndarray:
    if ridge > 0:
        return np.linalg.solve(P + _damping(P, ridge), importance)
    return np.linalg.lstsq(P, importance, rcond=None)[0]  # duplicated prompts make P singular: least norm
