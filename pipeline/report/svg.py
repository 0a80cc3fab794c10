"""Matplotlib figures as SVG that sits inside a page: its fonts come from the page, its bytes from the data alone."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import matplotlib
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 400  # user units; narrow, so that text stays legible on a phone

INK, MUTED, RULE, PAPER = "#1d2329", "#5b6570", "#d9dde2", "#ffffff"
BLUE, VERMILION, GREEN, SKY, ORANGE, PURPLE = "#0072b2", "#d55e00", "#009e73", "#8cc8ea", "#e69f00", "#cc79a7"

STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, small, set in the page's font
    "text.parse_math": False,  # labels are data; a dollar sign is a dollar sign
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.labelsize": 11,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": "#eceef1",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.solid_capstyle": "round",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the page's style, whatever the user's own settings are."""
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's font has them
        yield


def picture(name: str, height: float, paint: Callable[[Figure], None]) -> Markup:
    """Return the SVG of a figure ``WIDTH`` units wide; ``name`` keeps its ids apart from other pictures'."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    paint(figure)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True
        )
    return Markup(_inline(file.getvalue()))


def bare(axes: Axes) -> None:
    """Take ticks and spines away."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _inline(svg: str) -> str:
    """Return the ``svg`` element without what reaches beyond it: style rules, group ids, fonts, fixed sizes."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'<defs>\s*<style type="text/css">[^<]*</style>\s*</defs>', "", svg, count=1)
    svg = re.sub(
        r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>',
        r'<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" \1>',
        svg,
    )
    return re.sub(r"<[^>]*>", _tag, re.sub(r">\s+<", "><", svg))


def _tag(match: re.Match[str]) -> str:
    tag = re.sub(r'^<g id="[^"]*"', "<g", match[0])
    tag = re.sub(r" ?font-family: [^;\"]*;?", "", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    return re.sub(r"(\.\d\d)\d+", r"\1", tag).replace("\n", "")
