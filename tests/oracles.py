"""Slow and obvious versions of the maths, each written without the code that it judges."""

import math
from collections.abc import Mapping
from itertools import product

import numpy as np
import torch
from scipy.integrate import quad
from scipy.special import comb
from scipy.stats import beta as beta_distribution

from pipeline.policy import Policy
from pipeline.records import Rollouts, keyed_seed


def information_by_quadrature(alpha: float, beta: float, rollouts: int) -> float:
    """E over phi of the divergence of Binomial(K, phi) from its own mixture, in nats."""
    counts = np.arange(rollouts + 1)

    def binomial(phi: float) -> np.ndarray:
        return comb(rollouts, counts) * phi**counts * (1 - phi) ** (rollouts - counts)

    belief = beta_distribution(alpha, beta)
    mixture = [quad(lambda phi, s=s: belief.pdf(phi) * binomial(phi)[s], 0, 1, epsabs=1e-13)[0] for s in counts]

    def divergence(phi: float) -> float:
        p = binomial(phi)
        return sum(p[s] * math.log(p[s] / mixture[s]) for s in counts if p[s] > 0)

    return quad(lambda phi: belief.pdf(phi) * divergence(phi), 0, 1, epsabs=1e-12, limit=200)[0]


def cosine_by_loop(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """One quotient a pair."""
    out = np.zeros((len(features), len(targets)))
    for i, j in product(range(len(features)), range(len(targets))):
        z, v = features[i].astype(float), targets[j].astype(float)
        out[i, j] = sum(z * v) / math.sqrt(sum(z * z) * sum(v * v))
    return out


def fuse_by_sorting(scores: np.ndarray, budget: int) -> list[float]:
    """Sum of 1 / rank over the lists that a prompt is on."""
    fused = [0.0] * len(scores)
    for target in range(scores.shape[1]):
        best = sorted(range(len(scores)), key=lambda i: (-scores[i, target], i))[:budget]
        for rank, i in enumerate(best, start=1):
            fused[i] += 1 / rank
    return fused


def dense_projection(layout: Mapping[str, int], dim_out: int, *, keep: float, seed: int, width: int) -> np.ndarray:
    """The (dim_in, dim_out) matrix of a two-stage projection, coordinate by coordinate in Python integers."""
    rows = []
    for name, size in layout.items():
        for i in range(size):
            block = _hashed(i // width, "projection", seed, name)
            entry = (i % width + ((block >> 32) * width >> 32)) % width
            bits = _hashed(entry, "projection", seed)
            row = [0.0] * dim_out
            if (_hashed(i, "kept", seed, name) >> 11) / 2.0**53 < keep:
                row[(bits >> 32) * dim_out >> 32] = (-1.0) ** (block % 2 + bits % 2) / math.sqrt(keep)
            rows.append(row)
    return np.array(rows)


def _hashed(counter: int, *identity: object) -> int:
    return _splitmix((counter + keyed_seed(*identity)) % 2**64)


def _splitmix(x: int) -> int:
    x = x * 0x9E3779B97F4A7C15 % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def logps_of_one(policy: Policy, prompt: list[int], completion: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probability of each token of one completion, without padding or cache."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = policy.model(input_ids=ids, use_cache=False).logits[0].float() / temperature
    logp = logits.log_softmax(dim=-1)
    return torch.stack([logp[len(prompt) + t - 1, token] for t, token in enumerate(completion)])


def surrogate_by_loop(
    name: str, new: list[torch.Tensor], old: list[torch.Tensor], rewards: list[float]
) -> torch.Tensor:
    """The objective of one prompt as a differentiable number, to be raised; ratios that only weigh are detached."""
    r = torch.tensor(rewards, dtype=new[0].dtype)
    if name == "rft":
        return sum(x.mean() * (right > 0) for x, right in zip(new, r, strict=True)) / max(1, int((r > 0).sum()))
    w = torch.stack([(x.detach() - y).sum().exp().clamp(max=5.0) for x, y in zip(new, old, strict=True)])
    if name == "reinforce":
        total = torch.zeros(())
        for k, x in enumerate(new):
            others = [j for j in range(len(new)) if j != k]
            baseline = sum(w[j] * r[j] for j in others) / sum(w[j] for j in others)
            total = total + w[k] * (r[k] - baseline) * x.sum() / len(new)
        return total
    if name in ("grpo_sequence", "grpo_optimal_baseline"):
        mean = (w * r).sum() / w.sum()
        spread = ((w * (r - mean) ** 2).sum() / w.sum()).sqrt()
        if name == "grpo_optimal_baseline":
            u = w * torch.stack([sum((1 - p) ** 2 for p in x.detach().exp()) / len(x) ** 2 for x in new])
            mean = (u * r).sum() / u.sum()
        return sum(w[k] / w.sum() * (r[k] - mean) / (spread + 1e-4) * x.mean() for k, x in enumerate(new))
    advantage = (r - r.mean()) / (r.std(correction=1) + 1e-4)
    if name == "grpo_weighted_group":
        q = torch.stack([(x.detach().mean() - y.mean()).exp() for x, y in zip(new, old, strict=True)])
        mean = (q * r).sum() / q.sum()
        advantage = (r - mean) / (((q * (r - mean) ** 2).sum() / q.sum()).sqrt() + 1e-4)
    terms = []
    for a, x, y in zip(advantage, new, old, strict=True):
        ratio = (x - y).exp()
        clipped = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        terms.append((clipped if name == "grpo_clipped" else ratio * a).mean())
    return sum(terms) / len(terms)


def coefficients_by_autograd(
    name: str, logp_new: np.ndarray, logp_old: np.ndarray, mask: np.ndarray, rewards: np.ndarray
) -> np.ndarray:
    """What the loss of one prompt says of each token: its derivative by the log-probability."""
    new = [torch.tensor(x[m], requires_grad=True) for x, m in zip(logp_new, mask, strict=True)]
    old = [torch.tensor(x[m]) for x, m in zip(logp_old, mask, strict=True)]
    out = np.zeros(mask.shape)
    for row, grad in enumerate(torch.autograd.grad(surrogate_by_loop(name, new, old, rewards.tolist()), new)):
        out[row, mask[row]] = grad
    return out


def gradients_by_loop(policy: Policy, rollouts: Rollouts, objective: str) -> dict[str, dict[str, torch.Tensor]]:
    """For each prompt, the gradient of its objective by one backward pass of its own, rollout after rollout."""
    out = {}
    for uid, rows in rollouts.groups().items():
        new = [
            logps_of_one(policy, rollouts.prompt_ids[i], rollouts.completion_ids[i], rollouts.temperature[i]).double()
            for i in rows
        ]
        old = [torch.tensor(np.array(rollouts.logp_old[i], float)) for i in rows]
        total = surrogate_by_loop(objective, new, old, [rollouts.reward[i] for i in rows])
        parameters = policy.trainable()
        grads = torch.autograd.grad(total, list(parameters.values()))
        out[uid] = dict(zip(parameters, grads, strict=True))
    return out
