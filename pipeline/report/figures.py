"""The pictures of the report, one function each, from cleaned facts to SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.report import dots
from pipeline.report.curves import curves
from pipeline.report.svg import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    PURPLE,
    RULE,
    SKY,
    VERMILION,
    bare,
    house_style,
    picture,
)
from pipeline.report.text import count, label, number, signed

Facts = Mapping[str, Any]

REASONS = {
    "selected": BLUE, "budget": SKY, "prior": "#b9c2cb", "no_signal": "#8b96a1", "unseen": "#e4e7eb",
    "duplicate": ORANGE, "contaminated": VERMILION, "error": INK,
}  # fmt: skip
BLUES = LinearSegmentedColormap.from_list("blues", ["#f3f7fa", "#9fcbe6", BLUE])
FEW = 12  # abilities in a picture; the rest are counted together
NUMBERED = 9  # columns of a matrix whose cells still have room for a number


def draw(facts: Facts) -> dict[str, list[Markup]]:
    """Return every picture that the facts have something to show for; a missing one is an empty list."""
    stages, weights = facts["stages"], _pooled_weights(facts["diem"])
    with house_style():
        return {
            "curves": curves(facts["summary"]),
            "influence": _influence(stages),
            "beliefs": [picture("beliefs", 230, partial(_beliefs, facts["beliefs"]))],
            "overlap": _overlap(facts["overlap"], [stage["stage"] for stage in stages]),
            "weights": [picture("weights", 62 + 26 * len(weights), partial(_weights, weights))] if weights else [],
            "reasons": [picture("reasons", 100 + 34 * len(stages), partial(_reasons, stages))],
            "abilities": _abilities(stages),
            "validity": dots.pictures(facts["validity"]),
            "seconds": _seconds(facts["summary"]["runs"]),
        }


def _influence(stages: Sequence[Facts]) -> list[Markup]:
    targets = list(dict.fromkeys(name for stage in stages for name in stage["influence"]))
    known = {t: [_known(stage["influence"].get(t, ())) for stage in stages] for t in targets}
    numbers = [stage["stage"] for stage in stages]
    return [
        picture(f"influence {i}", 62 + 56 * len(stages), partial(_ridge, target, known[target], numbers))
        for i, target in enumerate(targets)
        if any(known[target])
    ]


def _ridge(target: str, values: Sequence[Sequence[float]], numbers: Sequence[int], figure: Figure) -> None:
    axes, every = figure.subplots(), [v for row in values for v in row]
    edges = np.linspace(min(0.0, *every) - 0.01, max(0.0, *every) + 0.01, 41)
    axes.axvline(0, color=MUTED, lw=0.8)
    for base, cosines in enumerate(values):
        says, floor = "not scored", base + 0.45
        if cosines:
            heights = np.histogram(cosines, edges)[0]
            tops, median = floor - 0.7 * heights / heights.max(), float(np.median(cosines))
            axes.stairs(tops, edges, baseline=floor, fill=True, facecolor=SKY, edgecolor=BLUE, lw=0.6)
            axes.vlines(median, floor - 0.8, floor, color=VERMILION, lw=1.8)
            says = f"median {signed(median, 2)}"
        axes.axhline(floor, color=RULE, lw=0.8)
        axes.text(edges[-1], base - 0.3, says, ha="right", va="center", color=MUTED, size=10.5)
    axes.set_yticks(range(len(values)), [f"stage {n}" for n in numbers])
    axes.set(xlim=(edges[0], edges[-1]), ylim=(len(values) - 0.5, -0.5))
    axes.set(title=f"target: {label(target, 40)}", xlabel="cosine with the target's gradient")
    bare(axes)


def _beliefs(beliefs: Facts, figure: Figure) -> None:
    axes, edges = figure.subplots(), [i / 25 for i in range(26)]
    before, after = (beliefs[when] for when in ("before", "after"))
    axes.hist(_known(before["mean"]), bins=edges, color="#c9d0d7", label=label(before["label"], 28))
    axes.hist(_known(after["mean"]), bins=edges, histtype="step", color=BLUE, lw=1.8, label=label(after["label"], 28))
    axes.set(xlim=(0, 1), xlabel="believed success rate", title="prompts of the pool")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=2)


def _overlap(shares: Sequence[Sequence[float]], numbers: Sequence[int]) -> list[Markup]:
    if len(shares) < 2:
        return []
    names = [f"stage {n}" for n in numbers]
    cells = [[number(v, 2) for v in row] for row in shares]
    height = min(330.0, 70 + 44 * len(shares))
    return [
        picture("overlap", height, partial(_matrix, shares, cells, names, [str(n) for n in numbers], "also in stage"))
    ]


def _abilities(stages: Sequence[Facts]) -> list[Markup]:
    total: dict[str, int] = {}
    for stage in stages:
        for ability, n in stage["abilities"].items():
            total[ability] = total.get(ability, 0) + n
    if not total:
        return []
    names = sorted(total, key=lambda a: (-total[a], a))
    kept, rest = (names, []) if len(names) <= FEW else (names[: FEW - 1], names[FEW - 1 :])
    rows = [[stage["abilities"].get(a, 0) for stage in stages] for a in kept]
    if rest:
        rows.append([sum(stage["abilities"].get(a, 0) for a in rest) for stage in stages])
    sizes = [max(1, sum(stage["abilities"].values())) for stage in stages]
    shares = [[n / size for n, size in zip(row, sizes, strict=True)] for row in rows]
    cells = [[count(n) for n in row] for row in rows]
    left = [label(a) for a in kept] + ([f"{len(rest)} others"] if rest else [])
    paint = partial(_matrix, shares, cells, left, [str(stage["stage"]) for stage in stages], "selected in stage")
    return [picture("abilities", 56 + 28 * len(rows), paint)]


def _matrix(shares: Any, cells: Any, left: Sequence[str], below: Sequence[str], title: str, figure: Figure) -> None:
    axes = figure.subplots()
    bare(axes)
    known = np.array([[np.nan if v is None else v for v in row] for row in shares], float)
    top = max(1e-9, float(np.nanmax(known))) if np.isfinite(known).any() else 1.0
    axes.pcolormesh(np.nan_to_num(known), cmap=BLUES, vmin=0, vmax=top, edgecolors=PAPER, linewidth=2)
    axes.invert_yaxis()
    axes.set_yticks(np.arange(len(left)) + 0.5, left)
    axes.set_xticks(np.arange(len(below)) + 0.5, below)
    axes.xaxis.tick_top()
    axes.set_title(title)
    if len(below) <= NUMBERED:
        for i, row in enumerate(cells):
            for j, cell in enumerate(row):
                dark = np.nan_to_num(known)[i, j] > 0.85 * top
                axes.text(j + 0.5, i + 0.5, cell, ha="center", va="center", color=PAPER if dark else INK)


def _pooled_weights(diem: Sequence[Facts]) -> dict[str, list[float]]:
    pooled: dict[str, list[float]] = {}
    for stage in diem:
        for ability, weights in stage["weights"].items():
            pooled.setdefault(ability, []).extend(_known(weights))
    filled = {ability: weights for ability, weights in pooled.items() if weights}
    names = sorted(filled, key=lambda a: (-len(filled[a]), a))
    kept = {a: filled[a] for a in (names if len(names) <= FEW else names[: FEW - 1])}
    rest = [w for a in names if a not in kept for w in filled[a]]
    return kept | ({f"{len(names) - len(kept)} others": rest} if rest else {})


def _weights(weights: Mapping[str, Sequence[float]], figure: Figure) -> None:
    axes = figure.subplots()
    axes.axvline(1, color=MUTED, lw=1)
    axes.boxplot(
        list(weights.values()), orientation="horizontal", whis=(5, 95), showfliers=False, widths=0.55,
        patch_artist=True,
        boxprops={"facecolor": SKY, "edgecolor": BLUE}, medianprops={"color": VERMILION, "lw": 1.8},
        whiskerprops={"color": BLUE}, capprops={"color": BLUE},
    )  # fmt: skip
    axes.set_yticks(range(1, len(weights) + 1), [label(ability) for ability in weights])
    axes.invert_yaxis()
    axes.set(xlabel="weight of a sample in its step")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _reasons(stages: Sequence[Facts], figure: Figure) -> None:
    axes, found = figure.subplots(), {reason for stage in stages for reason in stage["reasons"]}
    order = [r for r in REASONS if r in found] + sorted(found - set(REASONS))
    left = np.zeros(len(stages))
    for reason in order:
        sizes = np.array([stage["reasons"].get(reason, 0) for stage in stages], float)
        color, name = REASONS.get(reason, PURPLE), label(reason.replace("_", " "))
        axes.barh(range(len(stages)), sizes, left=left, color=color, edgecolor=PAPER, lw=1, height=0.66, label=name)
        for y, (x, n) in enumerate(zip(left, sizes, strict=True)):
            if n > 0.09 * sum(stages[y]["reasons"].values()):
                light = reason in ("selected", "contaminated", "error")
                axes.text(x + n / 2, y, count(n), ha="center", va="center", color=PAPER if light else INK, size=10.5)
        left += sizes
    axes.set_yticks(range(len(stages)), [f"stage {stage['stage']}" for stage in stages])
    axes.invert_yaxis()
    axes.set_xlabel("prompts of the pool")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    axes.spines["left"].set_visible(False)
    if order:
        figure.legend(loc="outside upper left", ncols=4, columnspacing=1.0, handlelength=1.0)


def _seconds(runs: Sequence[Facts]) -> list[Markup]:
    kinds: dict[str, float] = {}
    for run in runs:
        for kind, seconds in run["seconds"].items():
            kinds[kind] = kinds.get(kind, 0.0) + (seconds or 0.0) / len(runs)
    ordered = dict(sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
    return [picture("seconds", 30 + 25 * len(ordered), partial(_bars, ordered))] if ordered else []


def _bars(values: Mapping[str, float], figure: Figure) -> None:
    axes: Axes = figure.subplots()
    bare(axes)
    axes.barh(
        range(len(values)), list(values.values()), color=[BLUE if k == "train" else SKY for k in values], height=0.62
    )
    for y, seconds in enumerate(values.values()):
        axes.annotate(
            f"{seconds:,.1f} s", (seconds, y), (6, 0), textcoords="offset points", va="center", color=INK, size=10.5
        )
    axes.set_yticks(range(len(values)), [label(kind.replace("_", " ")) for kind in values])
    axes.set_xticks([])
    axes.set_xlim(0, 1.25 * max(1e-9, *values.values()))
    axes.axvline(0, color=RULE, lw=1)
    axes.invert_yaxis()


def _known(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None]
