"""How well do stored rollouts rank prompts as the policy moves?

    python -m tests.experiments.off_policy --folder runs/off_policy [--seeds 500 501 502] [--prompts 200]

The embedded policy is trained by plain GRPO as in the recipe. After 0, 10, 30 and 60 steps each arm scores the same
prompts from its own evidence. Truth is the score from 32 fresh rollouts a prompt at that policy, with the mean of the
group as baseline, against the same fresh validation gradient. A prompt whose rollouts agree scores 0. A finished
(seed, step) is not computed again; about 12 CPU minutes.
"""

import argparse
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from pipeline.advantages import has_signal
from pipeline.beliefs import from_history
from pipeline.curriculum import NONE, candidates, select_by_influence
from pipeline.evaluation import interval
from pipeline.objective import OBJECTIVES
from pipeline.staleness import staleness
from tests.experiments.off_policy_states import FRESH, RECIPE, STEPS, TRUTH, Evidence, State, states

TOKEN_RATIO = ("grpo", "grpo_weighted_group")
OURS = "grpo_optimal_baseline"
SAME, INDEPENDENT, STORED_ONCE = 0, 1, 2  # validation rollouts: those of the truth too, others as fresh, of step 0


def main() -> None:
    """Compute what is missing, and print a table a step."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[500, 501, 502])
    parser.add_argument("--prompts", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        if not all(_file(args.folder, seed, step).exists() for step in STEPS):
            for step, state in states(seed, args.prompts, args.folder):
                _file(args.folder, seed, step).write_bytes(pickle.dumps(state))
    for step in STEPS:
        found = [pickle.loads(_file(args.folder, seed, step).read_bytes()) for seed in args.seeds]  # noqa: S301
        tell(step, found)
        tell_cascade(step, found)


def _file(folder: Path, seed: int, step: int) -> Path:
    return folder / f"{seed}_{step}.pickle"


def tell(step: int, seeds: list[State]) -> None:
    """Print one row an arm: agreement with the truth, mean and half of a 95 % interval over the seeds."""
    print(f"\n## after {step} steps\n")
    print("| evidence | objective | rollouts a prompt for selection | Spearman | by seed | top 10 % | dot |", end="")
    print(" other validation rollouts | truth with the least-variance baseline |\n" + "|" + "---|" * 9)
    for rows in zip(*map(list, map(arms, seeds)), strict=True):
        columns = []
        for name in ("spearman", "top", "dot", "other", "least"):
            found = interval([row[name] for row in rows])
            columns.append(f"{found['mean']:.2f} ± {found['half_width'] or 0:.2f}")
        each = ", ".join(f"{row['spearman']:.2f}" for row in rows)
        cost = np.mean([row["cost"] for row in rows])
        first, *rest = columns
        print(
            f"| {rows[0]['evidence']} | {rows[0]['objective']} | {cost:.1f} | {first} | {each} | {' | '.join(rest)} |"
        )


def arms(state: State) -> Iterator[dict[str, object]]:
    """Yield one row an arm; ``cost`` counts rollouts that training did not make anyway, per prompt."""
    truth = score(state, state.fresh.first(TRUTH, skip=FRESH), "grpo_sequence")
    other = score(state, state.fresh.first(TRUTH, skip=FRESH), "grpo_sequence", target=INDEPENDENT)
    dots = score(state, state.fresh.first(TRUTH, skip=FRESH), "grpo_sequence", cosine=False)
    least = score(state, state.fresh.first(TRUTH, skip=FRESH), OURS)

    def row(label: str, evidence: Evidence, objective: str, cost: float, target: int = SAME, only=None):
        kept = np.arange(state.prompts) if only is None else only
        found = score(state, evidence, objective, target=target)
        return {
            "evidence": label,
            "objective": objective,
            "cost": cost,
            "spearman": _spearman(found[kept], truth[kept]),
            "top": _top(found[kept], truth[kept]),
            "dot": _spearman(score(state, evidence, objective, target=target, cosine=False)[kept], dots[kept]),
            "other": _spearman(found[kept], other[kept]),
            "least": _spearman(found[kept], least[kept]),
        }

    for k in (8, 16):
        for objective in ("grpo_sequence", OURS):
            yield row(f"fresh {k}", state.fresh.first(k), objective, k)
    for k in (8, 16, 32):
        for objective in sorted(set(OBJECTIVES) - {"grpo_clipped", "sequence", "token"}):
            yield row(f"stored {k}", state.stored.first(k), objective, k)
    for k in (8, 16, 32):
        for objective in ("grpo_sequence", OURS, "rft"):
            yield row(f"stored {k} + trained", state.stored.first(k) + state.trained, objective, k)
    yield row("stored 8 + trained, stored validation", state.stored.first(8) + state.trained, OURS, 8, STORED_ONCE)
    for objective in ("grpo_sequence", OURS):
        for k in (8, 32):
            for least_effective in (4, 8, 12):
                kept = state.stored.first(k) + state.trained
                stale = stale_prompts(kept, least_effective)
                label = f"stored {k} + trained + 8 fresh where under {least_effective} effective"
                fresh = state.fresh.first(8).of(stale)
                yield row(label, kept + fresh, objective, k + 8 * len(stale) / state.prompts)
    seen = np.unique(state.trained.owner)
    if len(seen) > 20:
        for objective in ("grpo_sequence", OURS, "rft"):
            yield row(f"trained alone, its {len(seen) / state.prompts:.0%}", state.trained, objective, 0, only=seen)


def stale_prompts(evidence: Evidence, least: float) -> np.ndarray:
    """The prompts with fewer effective rollouts than ``least``."""
    found = staleness(evidence.new, evidence.old, evidence.mask, evidence.owner)
    return found.owner[found.effective < least]


def score(state: State, evidence: Evidence, objective: str, *, target: int = SAME, cosine: bool = True) -> np.ndarray:
    """Score each prompt against a validation gradient, from gradients that are sums of the kept score functions."""
    kind = "token" if objective in TOKEN_RATIO else "sequence"
    e = evidence
    c = OBJECTIVES[objective](e.new, e.old, e.mask, e.reward, e.owner)[:, 0]  # its first token tells a rollout's share
    c = c / np.exp(e.new - e.old)[:, 0] if kind == "token" else c
    out = np.zeros(state.prompts)
    for prompt in range(state.prompts):
        rows = np.flatnonzero(e.owner == prompt)
        if not has_signal(e.reward[rows]):
            continue
        gram, begin = state.grams[kind][prompt], state.begins[prompt]
        shares = np.zeros(len(gram))
        np.add.at(shares, e.unit[rows] - begin, c[rows])
        dot = shares @ state.dots[kind][begin : begin + len(gram), target]
        norm = np.sqrt(max(shares @ gram @ shares, 0.0)) * state.norms[target]
        out[prompt] = (dot / norm if norm > 0 else 0.0) if cosine else dot
    return out


def tell_cascade(step: int, seeds: list[State]) -> None:
    """Print what pruning by w(p) saves and what the selection of a tenth loses by it, with 8 stored and the trained."""
    print(f"\n## pruning by w(p), after {step} steps\n")
    print("| candidates | prompts with a gradient | tokens saved | selected as without | true score of the selected |")
    print("|" + "---|" * 5)
    for share in (1.0, 0.5, 0.33, 0.2):
        columns = np.array([_pruned(state, share) for state in seeds])
        cells = [interval(column.tolist()) for column in columns.T]
        print(f"| {share} | " + " | ".join(f"{c['mean']:.2f} ± {c['half_width'] or 0:.2f}" for c in cells) + " |")
    bare = np.mean([score(s, s.fresh.first(TRUTH, skip=FRESH), OURS).mean() for s in seeds])
    print(f"\nMean true score of all prompts: {bare:.3f}")


def _pruned(state: State, share: float) -> tuple[float, float, float, float]:
    kept = state.stored.first(8) + state.trained
    found, truth = score(state, kept, OURS), score(state, state.fresh.first(TRUTH, skip=FRESH), OURS)
    uids = [f"{prompt:03d}" for prompt in range(state.prompts)]
    rows = [np.flatnonzero(kept.owner == prompt) for prompt in range(state.prompts)]
    seen, signal = np.array([len(r) > 0 for r in rows]), np.array([has_signal(kept.reward[r]) for r in rows])
    history = {
        uid: [(int(kept.reward[r[i : i + 8]].sum()), int((1 - kept.reward[r[i : i + 8]]).sum())) for i in range(0, len(r), 8)]
        for uid, r in zip(uids, rows, strict=True)
    }  # fmt: skip
    alpha, beta = from_history(uids, history, discount=RECIPE.beliefs.discount, strength=0.5, informative=1)
    tokens = np.array([kept.mask[r].sum() for r in rows])
    chosen = []
    for part in (1.0, share):
        excluded = candidates(uids, alpha, beta, seen, signal, share=part, **RECIPE.insight.weight)
        left = np.flatnonzero(excluded == NONE)
        picked = select_by_influence(
            uids, excluded, left, found[left][:, None], budget=state.prompts // 10, floor=0.0, seed=0
        ).chosen  # fmt: skip
        chosen.append(set(picked.tolist()))
    everything = np.flatnonzero(signal)
    return (
        len(left) / state.prompts,
        1 - tokens[left].sum() / tokens[everything].sum(),
        len(chosen[0] & chosen[1]) / len(chosen[0]),
        float(truth[sorted(chosen[1])].mean()),
    )


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


def _top(a: np.ndarray, b: np.ndarray) -> float:
    size = max(1, len(a) // 10)
    return len(set(np.argsort(-a)[:size]) & set(np.argsort(-b)[:size])) / size


if __name__ == "__main__":
    main()
