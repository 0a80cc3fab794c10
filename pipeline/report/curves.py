"""Learning curves: the level of each arm against optimizer steps, and against everything that was sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipeline.report.svg import BLUE, GREEN, MUTED, ORANGE, VERMILION, picture
from pipeline.report.text import count, label
from pipeline.report.words import arms, focus, plain

Facts = Mapping[str, Any]
Line = list[tuple[float, float]]

ARMS = {"curriculum": (BLUE, "-"), "control": (VERMILION, (0, (5, 2))), "random": (GREEN, (0, (1.5, 1.5)))}
AXES = {"step": "optimizer steps", "rollouts": "rollouts sampled, for selection too"}
FEW = 20  # evaluations in a line whose points are worth a dot each


def curves(summary: Facts) -> list[Markup]:
    """Return two pictures of the same levels: against steps, and against rollouts."""
    return [picture(f"curve {axis}", 290, partial(_panel, summary, axis)) for axis in AXES]


def _panel(summary: Facts, axis: str, figure: Figure) -> None:
    axes, runs, (split, metric) = figure.subplots(), summary["runs"], focus(summary)
    for arm in arms(summary):
        color, dash = ARMS.get(arm, (ORANGE, "-"))
        lines = [_line(run["arms"][arm]["curve"], axis, split, metric) for run in runs]
        if len(lines) > 1:
            for line in lines:
                axes.plot(*_xy(line.values()), color=color, lw=0.8, alpha=0.4)
        dot = "o" if len(lines[0]) < FEW else ""
        axes.plot(*_xy(_mean(lines)), color=color, ls=dash, lw=2.2, marker=dot, markersize=3, label=label(arm))
    _mark_stages(axes, runs[0]["arms"]["curriculum"], axis)
    axes.set_title(f"{label(split)} {label(plain(metric))}", pad=20)
    axes.set_xlabel(AXES[axis])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    axes.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=3)


def _line(curve: Sequence[Facts], axis: str, split: str, metric: str) -> dict[int, tuple[float, float]]:
    """Return (x, level) by optimizer step."""
    points = {point["step"]: (point[axis], point["sets"].get(split, {}).get(metric)) for point in curve}
    return {step: (x, y) for step, (x, y) in points.items() if y is not None}


def _mean(lines: Sequence[Mapping[int, tuple[float, float]]]) -> Line:
    """Return the mean over seeds at each step that every seed has."""
    shared = [step for step in lines[0] if all(step in line for line in lines)]
    return [
        (sum(line[s][0] for line in lines) / len(lines), sum(line[s][1] for line in lines) / len(lines)) for s in shared
    ]


def _xy(line: Any) -> tuple[list[float], list[float]]:
    points = list(line)
    return [x for x, _ in points], [y for _, y in points]


def _mark_stages(axes: Axes, arm: Facts, axis: str) -> None:
    """Draw a line where each stage of the curriculum begins to be selected."""
    at: float = arm["curve"][0][axis] if axis == "rollouts" else 0
    name = "stage {}" if len(arm["stages"]) <= 5 else "{}"
    for stage in arm["stages"]:
        axes.axvline(at, color=MUTED, lw=0.8, ls=(0, (1, 2)), zorder=0)
        axes.text(
            at,
            1.01,
            name.format(stage["stage"]),
            transform=axes.get_xaxis_transform(),
            color=MUTED,
            size=10,
            va="bottom",
        )
        at += stage["steps"] if axis == "step" else stage["rollouts"]["train"] + stage["rollouts"]["select"]
