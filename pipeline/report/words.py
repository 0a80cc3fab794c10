"""What the page says in words and tables, computed from the summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.report.text import MISSING, count, number, signed

Facts = Mapping[str, Any]

RIVALS = {"control": "the random control of equal steps", "random": "the random run of equal rollouts"}
METRICS = ("expected_reward", "greedy_accuracy")  # the first that was measured is the one that is talked about
DRAWS = ("influence", "floor", "shuffle")


def describe(facts: Facts) -> dict[str, Any]:
    """Return everything that the template needs beside the facts and the pictures."""
    summary = facts["summary"]
    split, metric = focus(summary)
    return {
        "measure": f"{split} {plain(metric)}",
        "levels": _levels(summary, split, metric),
        "verdicts": _verdicts(summary, split, metric),
        "results": _results(summary),
        "differences": _differences(summary),
        "stages": _stages(facts, split, metric),
        "belief_lines": [_belief(facts["beliefs"][when]) for when in ("before", "after")],
        "diem_line": _diem(facts),
        "excluded": ", ".join(f"{count(n)} {name}" for name, n in summary["runs"][0]["excluded"].items()),
        "seeds": ", ".join(str(seed) for seed in summary["seeds"]),
    }


def focus(summary: Facts) -> tuple[str, str]:
    """Return the split and the metric that headline and curves are about."""
    final = summary["final"]["curriculum"]
    split = "test" if "test" in final else list(final)[-1]
    return split, next((metric for metric in METRICS if metric in final[split]), next(iter(final[split])))


def arms(summary: Facts) -> list[str]:
    """Return the arms of a run, the curriculum first."""
    return sorted(summary["final"], key=lambda arm: ("curriculum", "control", "random", arm).index(arm))


def plain(metric: str) -> str:
    """Return the name of a metric as words."""
    return metric.replace("_", " ")


def _levels(summary: Facts, split: str, metric: str) -> str:
    def level(arm: str) -> str:
        return number(summary["final"][arm][split][metric]["mean"])

    start = _mean([run["arms"]["curriculum"]["start"][split][metric] for run in summary["runs"]])
    spent = {row["name"]: row["mean"]["curriculum"] for row in _spent(summary)}
    parts = [
        f"{split.capitalize()} {plain(metric)} {level('curriculum')} after {count(spent['optimizer steps'])} steps "
        f"and {count(spent['rollouts'])} rollouts, from {number(start)} at the start"
    ]
    parts += [f"{RIVALS.get(arm, arm).removeprefix('the ')} {level(arm)}" for arm in arms(summary)[1:]]
    seeds = len(summary["seeds"])
    return "; ".join(parts) + (f" (means of {seeds} seeds)." if seeds > 1 else ".")


def _verdicts(summary: Facts, split: str, metric: str) -> list[dict[str, str]]:
    verdicts = []
    for arm in arms(summary)[1:]:
        found = summary["paired_differences"].get(f"curriculum - {arm}")
        if found:
            verdicts.append(_verdict(found["final"][split][metric], RIVALS.get(arm, arm)))
    missing = "No control was run, so this run does not say what the selection was worth."
    return verdicts or [{"kind": "open", "text": missing}]


def _verdict(cell: Facts, rival: str) -> dict[str, str]:
    mean, half = cell["mean"], cell["half_width"]
    if mean is None:
        return {"kind": "open", "text": f"The difference to {rival} was not measured."}
    side = f"ahead of {rival} by {number(mean)}" if mean > 0 else f"behind {rival} by {number(-mean)}"
    if mean == 0:
        side = f"level with {rival}"
    if half is None:
        return {"kind": "open", "text": f"The curriculum ended {side}: one seed, no interval, so this may be chance."}
    side = f"The curriculum ended {side}"
    between = f"95 % interval {signed(mean - half)} to {signed(mean + half)}, {cell['n']} paired seeds"
    if abs(mean) <= half:
        zero = f"{side}, but this is no clear difference: the interval contains zero ({between})."
        return {"kind": "open", "text": zero}
    return {"kind": "ahead" if mean > 0 else "behind", "text": f"{side} ({between})."}


def _results(summary: Facts) -> dict[str, Any]:
    names = arms(summary)
    rows = []
    for split, metric in _measures(summary):
        start = _mean([run["arms"]["curriculum"]["start"][split][metric] for run in summary["runs"]])
        cells = [_cell(summary["final"][arm][split][metric], number) for arm in names]
        rows.append({"split": split, "metric": plain(metric), "start": number(start), "cells": cells})
    spent = [{"name": r["name"], "cells": [count(r["mean"][arm]) for arm in names]} for r in _spent(summary)]
    return {"arms": names, "rows": rows, "spent": spent}


def _differences(summary: Facts) -> dict[str, Any]:
    pairs = summary["paired_differences"]
    rows = []
    for split, metric in _measures(summary):
        cells = [_cell(pair[kind][split][metric], signed) for pair in pairs.values() for kind in ("final", "late")]
        rows.append({"split": split, "metric": plain(metric), "cells": cells})
    return {"rivals": [p.removeprefix("curriculum - ") for p in pairs], "rows": rows, "late_is": summary["late_is"]}


def _measures(summary: Facts) -> list[tuple[str, str]]:
    final = summary["final"]["curriculum"]
    splits = sorted(final, key=lambda split: split != "test")
    return [(split, metric) for split in splits for metric in final[split]]


def _cell(value: Facts, show: Any) -> dict[str, Any]:
    mean, half = value["mean"], value["half_width"]
    known = half is not None
    return {"mean": show(mean), "half": number(half), "known": known, "sure": known and abs(mean or 0.0) > half}


def _spent(summary: Facts) -> list[dict[str, Any]]:
    names = {"steps": "optimizer steps", "rollouts": "rollouts"}
    return [
        {
            "name": name,
            "mean": {arm: _mean([run["arms"][arm][key] for run in summary["runs"]]) for arm in arms(summary)},
        }
        for key, name in names.items()
    ]


def _stages(facts: Facts, split: str, metric: str) -> list[dict[str, Any]]:
    drawn = {stage["stage"]: stage["drawn"] for stage in facts["stages"]}
    rows = []
    for stage in facts["summary"]["runs"][0]["arms"]["curriculum"]["stages"]:
        by = drawn.get(stage["stage"], {})
        rows.append(
            {
                "stage": stage["stage"],
                "steps": stage["steps"],
                "selected": count(stage["selected"]),
                "drawn": ", ".join(f"{count(by[d])} {d}" for d in (*DRAWS, *sorted(set(by) - set(DRAWS))) if by.get(d))
                or MISSING,
                "train": count(stage["rollouts"]["train"]),
                "select": count(stage["rollouts"]["select"]),
                "signal": number(stage["groups_with_signal"], 2),
                "level": number(stage["level"].get(split, {}).get(metric)),
                "seconds": count(sum(s for s in stage["seconds"].values() if s)),
            }
        )
    return rows


def _belief(belief: Facts) -> str:
    means = [m for m in belief["mean"] if m is not None]
    line = f"{belief['label']}: mean {number(_mean(means), 2)}"
    seen = belief.get("n_obs")
    if seen:
        line += f", {count(sum(n is not None and n > 0 for n in seen))} of {count(len(seen))} prompts observed"
    return line


def _diem(facts: Facts) -> str:
    weighted = facts["diem"]
    if not weighted:
        return "Weights were off: every sample counted the same in every step, which is plain GRPO."
    same = [str(stage["stage"]) for stage in weighted if stage["identity"]]
    if len(same) == len(weighted):
        return "Every weight was one: the steps were plain GRPO, and the pictures below have nothing to show."
    plain_stages = [str(s["stage"]) for s in facts["stages"] if s["stage"] not in {w["stage"] for w in weighted}]
    lines = []
    if same:
        lines.append(f"In stage {', '.join(same)} every weight was one, which is plain GRPO.")
    if plain_stages:
        lines.append(f"Stage {', '.join(plain_stages)} was trained without weights, for want of a reference gradient.")
    return " ".join(lines) or "In every stage weights differed from one."


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
