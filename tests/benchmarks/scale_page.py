"""The tables and the picture of SCALE.md, from what ``tests.benchmarks.scale`` measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE, PICTURE = ROOT / "SCALE.md", ROOT / "docs" / "scale.svg"
COLOURS = {"write gradients": "#5b6570", "write evidence": "#e69f00", "cascade": "#009e73", "score": "#0072b2",
           "select": "#d55e00", "read the stage": "#cc79a7"}  # fmt: skip


def write(result: dict[str, Any]) -> None:
    """Put the tables between their marks in the page, and the picture beside it."""
    text = PAGE.read_text()
    for name, table in (("measured", measured(result)), ("shards", shards(result)), ("pools", pools(result))):
        text, found = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", rf"\g<1>{table}\n\g<2>", text, flags=re.DOTALL)
        assert found == 1, name
    PAGE.write_text(text)
    PICTURE.parent.mkdir(exist_ok=True)
    draw(result, PICTURE)


def measured(result: dict[str, Any]) -> str:
    """Return the table of the measured steps: a row a step, a column a size."""
    rows = {(row["step"], row["prompts"]): row for row in result["rows"]}
    counts = sorted({count for _, count in rows})
    lines = ["| step | " + " | ".join(f"{count:,} prompts" for count in counts) + " |", "|---|" + "---|" * len(counts)]
    for step in dict.fromkeys(row["step"] for row in result["rows"]):
        cells = [_cell(rows.get((step, count))) for count in counts]
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shards(result: dict[str, Any]) -> str:
    """Return the table of the measured shards beside the formulas of the dry run."""
    lines = ["| policy | step | tokens of a prompt, of a completion | seconds of a core a prompt | by the formula | "
             "bytes a prompt | memory |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in result["shards"]:
        each = 1 / row["prompts"]
        asked, said = row["tokens"]
        lines.append(
            f"| {row['policy']} | {row['step']} | {asked}, {said:.0f} | {row['processor'] * each:.3g} | "
            f"{row['formula'] * each:.3g} | {row['disk'] * each:,.0f} | {_gib(row['memory'])} |"
        )
    return "\n".join(lines)


def pools(result: dict[str, Any]) -> str:
    """Return the table of whole pools: hours, disk, dollars."""
    found = {(row["policy"], row["step"], row["prompts"]): row for row in result["extrapolated"]}
    counts = sorted({count for *_, count in found})
    lines = ["| policy | step | " + " | ".join(f"{count:,}" for count in counts) + " |",
             "|---|---|" + "---|" * len(counts)]  # fmt: skip
    for policy, step in dict.fromkeys((row["policy"], row["step"]) for row in result["extrapolated"]):
        cells = [_pool(found[policy, step, count]) for count in counts]
        lines.append(f"| {policy} | {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw seconds of the processor and peak memory of each step against the size of the pool, both axes logarithmic."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    settings = {"svg.hashsalt": "scale", "svg.fonttype": "path", "font.size": 10, "axes.spines.top": False,
                "axes.spines.right": False, "axes.titlelocation": "left"}  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9, 3.8), layout="constrained", facecolor="white")
        sides = (("processor", "processor time [s]", 1.0), ("memory", "peak memory of the step [GiB]", 2.0**30))
        for axes, (name, title, unit) in zip(figure.subplots(1, 2), sides, strict=True):
            for step, colour in COLOURS.items():
                rows = [row for row in result["rows"] if row["step"] == step]
                x, y = [row["prompts"] for row in rows], [row[name] / unit for row in rows]
                axes.plot(x, y, marker="o", markersize=4, color=colour, label=step)
            axes.set(xscale="log", yscale="log", title=title, xlabel="prompts in the pool")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter("")
            axes.grid(color="#eceef1")
            axes.set_axisbelow(True)
        figure.axes[1].yaxis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if f"{v:g}"[-1] in "25" else ""))
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not measured"
    disk = row["objects"] + row["catalog"]
    parts = [f"{_number(row['processor'])} s", _gib(row["memory"]), f"{disk / 1e9:.2g} GB" if disk > 1e6 else ""]
    return ", ".join(part for part in parts if part)


def _pool(row: dict[str, Any]) -> str:
    dollars = f", ${_number(row['dollars'])}" if "dollars" in row else ""
    return f"{_number(row['hours'])} h, {_number(row['disk'] / 1e9)} GB{dollars}"


def _gib(memory: float) -> str:
    return f"{memory / 2**30:.2f} GiB"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
