"""The report of a run: one self-contained page, made of numbers that somebody else gathered.

Everything that a model or a data set wrote is untrusted. It passes ``text.clean`` first, which makes control and bidi
characters visible, and is then only ever escaped text: no markup, no script, no link. The page loads nothing, and says
so to the browser. The same facts give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.report import agreement, text, words


def render(facts: Mapping[str, Any]) -> str:
    """Return the HTML page of a run.

    Args:
        facts: ``name``, ``settings`` (TOML), ``summary`` (levels, curves and costs of every seed), and of the seed that
            the pictures show: ``stages``, ``overlap``, ``beliefs``, ``diem``, and ``full`` and ``validity`` or None.
            Numbers that are not finite count as missing.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from pipeline.report import figures

    cleaned = text.clean(facts)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": text.number,
        "signed": text.signed,
        "count": text.count,
        "excerpt": text.excerpt,
        "label": text.label,
    }
    return environment.get_template("page.html.j2").render(
        facts=cleaned,
        figures=figures.draw(cleaned),
        **words.describe(cleaned),
        **agreement.describe(cleaned["validity"]),
    )
