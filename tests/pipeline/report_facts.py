"""Facts of an invented run, in the shape that ``flows`` gathers them."""

import random

TARGETS = ["validation_add", "validation_sub"]
SETS = [*TARGETS, "test"]


def cell(mean, half=None, n=1):
    return {"mean": mean, "half_width": half, "n": n}


def arm(seed, level, steps, select, metrics):
    """One arm of one seed, whose last level is `level` plus a little of the seed."""
    curve = []
    for step in range(0, steps + 1, 10):
        values = dict.fromkeys(metrics, level * (0.6 + 0.4 * step / steps) + 0.002 * seed)
        curve.append(
            {"step": step, "rollouts": step * 128 + select * (step // 30), "sets": dict.fromkeys(SETS, values)}
        )
    start, final = curve[0]["sets"], curve[-1]["sets"]
    stage = {
        "steps": 30, "selected": 480, "rollouts": {"train": 3840, "select": select}, "level": final,
        "groups_with_signal": 0.7, "seconds": {"train": 12.25, "score": 1.5},
    }  # fmt: skip
    stages = [stage | {"stage": i} for i in range(steps // 30)]
    return {
        "rollouts": curve[-1]["rollouts"],
        "steps": steps,
        "start": start,
        "final": final,
        "curve": curve,
        "stages": stages,
    }


def examples(sign):
    """Three examples of one end, one without a pass rate, one without a completion."""
    common = {"ability": "add", "cosines": dict.fromkeys(TARGETS, sign * 0.3)}
    rows = [("1+1=", "2", None, "3"), ("2+2=", "4", 0.25, None), ("3+3=", "6", 0.5, "6")]
    names = ("prompt", "ground_truth", "pass_rate", "completion")
    return [common | {"prompt_uid": f"{i:032x}"} | dict(zip(names, row, strict=True)) for i, row in enumerate(rows)]


def shown(number, scored, rng):
    """What the stores tell of a stage; the first is never scored."""
    scored_now = scored and number > 0
    return {
        "stage": number,
        "drawn": {"influence": 432, "floor": 48} if scored_now else {"shuffle": 480},
        "influence": {t: [rng.gauss(0.1, 0.2) for _ in range(50 * scored_now)] for t in TARGETS * scored},
        "reasons": {"selected": 480, "budget": 120, "no_signal": 150, "unseen": 50},
        "abilities": {"add": 300, "sub": 180},
        "best": examples(1) * scored_now,
        "worst": examples(-1) * scored_now,
    }


def validity(rng):
    """What was measured of scores and effects; the score of one draw has no order."""
    scores = ("cropi", "cropi_sketch", "dot", "exact", "insight", "norm", "uniform", "variance", "of_another_kind")
    nothing = {"rho": None, "low": None, "high": None, "n": 60}

    def found():
        rho = rng.uniform(-0.4, 0.9)
        return {"rho": rho, "low": rho - 0.15, "high": rho + 0.1, "n": 60}

    return {
        "agreement": {
            effect: {split: {s: nothing if s == "uniform" else found() for s in scores} for split in ("test", "validation")}
            for effect in ("left_out", "other", "raw", "unit")
        },
        "held_out": {"test": 400, "validation": 96},
        "reliability": {"cropi": {"halves": 0.25, "whole": 0.4}, "dot": {"halves": -0.1, "whole": None}},
        "target_cosine": 0.804,
        "dtype": {"dtype": "bfloat16", "mean": 0.9987, "least": 0.9971, "prompts": 8},
        "prompts": {"asked": 128, "signal": 60, "signal_other": 51, "pool": 24},
        "step": 180, "seed": 7, "rollouts": 8, "validation_rollouts": 32,
    }  # fmt: skip


def make(
    *, seeds=(0, 1, 2), controls=("control", "random"), diem=True, exact=True, scored=True, stages=3, difference=None,
    valid=True,
):  # fmt: skip
    """Facts of a run, as ``flows`` gathers them."""
    rng, metrics = random.Random(0), ["greedy_accuracy"] + ["expected_reward"] * exact
    levels = {"curriculum": 0.55} | {a: {"control": 0.53, "random": 0.54}[a] for a in controls}
    runs = [
        {
            "seed": seed,
            "arms": {
                a: arm(seed, level, 30 * stages, 800 * (a == "curriculum"), metrics) for a, level in levels.items()
            },
            "excluded": {"duplicate": 12},
            "seconds": {"train": 131.5, "evaluate": 28.0, "start_policy": 0.04},
        }
        for seed in seeds
    ]
    spread = (0.03 if len(seeds) > 1 else None, len(seeds))
    final = {a: {s: {m: cell(level, *spread) for m in metrics} for s in SETS} for a, level in levels.items()}
    table = {s: {m: difference or cell(0.02, *spread) for m in metrics} for s in SETS}
    weights = {a: [rng.gauss(1, 0.2) for _ in range(20)] for a in ("add", "sub")}
    step = {
        "identity": False,
        "effective_samples": 9.8,
        "prompts": 11.2,
        "clipped_share": 0.25,
        "cosine_to_plain": 0.97,
    }
    return {
        "name": "demo",
        "summary": {
            "name": "demo", "version": "0.1.0", "seeds": list(seeds), "final": final, "late_is": "mean of the end", "runs": runs,
            "paired_differences": {f"curriculum - {a}": {"final": table, "late": table} for a in controls},
        },
        "stages": [shown(i, scored, rng) for i in range(stages)],
        "overlap": [[1.0 if a == b else 0.4 for b in range(stages)] for a in range(stages)],
        "beliefs": {
            "before": {"label": "before", "mean": [0.5] * 40, "n_obs": [0] * 20 + [8] * 20},
            "after": {"label": "after", "mean": [rng.random() for _ in range(40)]},
        },
        "full": {t: {"rho": 0.71, "low": 0.5, "high": 0.85, "n": 54} for t in TARGETS} if valid else None,
        "validity": validity(rng) if valid else None,
        "diem": [{"stage": i, "weights": weights, **step} for i in range(1, stages)] * diem,
        "settings": 'name = "demo"\n',
    }  # fmt: skip
