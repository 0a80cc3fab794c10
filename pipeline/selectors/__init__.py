"""The table of selectors: one file a published method, named as its paper names it, each with a ``score``."""

from __future__ import annotations

from pipeline.selectors import cropi, insight, uniform

SELECTORS = {"cropi": cropi, "insight": insight, "uniform": uniform}
