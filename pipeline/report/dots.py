"""Dots with whiskers: the rank agreement of each score with a measured effect, one picture an effect."""

from __future__ import annotations

from functools import partial

from markupsafe import Markup
from matplotlib.figure import Figure

from pipeline.report.agreement import EFFECTS, Facts, effects, name, scores
from pipeline.report.svg import BLUE, MUTED, ORANGE, RULE, picture
from pipeline.report.text import label

COLORS = {"validation": BLUE, "test": ORANGE}


def pictures(validity: Facts | None) -> list[Markup]:
    """Return one picture an effect: the rank agreement of each score, with its interval, on each held-out set."""
    if validity is None:
        return []
    return [
        picture(f"validity {effect}", 84 + 30 * len(scores(validity)), partial(_panel, effect, validity))
        for effect in effects(validity)
    ]


def _panel(effect: str, validity: Facts, figure: Figure) -> None:
    axes, names = figure.subplots(), scores(validity)
    sets = {split: validity["agreement"][effect][split] for split in validity["held_out"]}
    axes.axvline(0, color=MUTED, lw=0.8)
    for i, (split, found) in enumerate(sorted(sets.items(), key=lambda item: item[0] != "validation")):
        color, shift = COLORS.get(split, MUTED), (i - (len(sets) - 1) / 2) * 0.3
        known = [(y + shift, found[score]) for y, score in enumerate(names) if found[score]["rho"] is not None]
        axes.hlines([y for y, _ in known], [f["low"] for _, f in known], [f["high"] for _, f in known], color=color)
        axes.plot([f["rho"] for _, f in known], [y for y, _ in known], "o", color=color, ms=4.5, label=label(split))
    axes.set_yticks(range(len(names)), [label(name(score)) for score in names])
    axes.set(xlim=(-1.02, 1.02), ylim=(len(names) - 0.5, -0.5), xlabel="rank agreement with the measured effect")
    axes.set_title(EFFECTS.get(effect, effect), pad=18)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.axhline(len(names) - 1.5, color=RULE, lw=0.8)
    figure.legend(loc="outside upper left", ncols=2)
