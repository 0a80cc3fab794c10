"""What a person sees while a run goes on: headings, facts, and bars with the time that is left. The door to ``rich``.

On a terminal a bar moves; elsewhere it becomes a line every few seconds, so that a log stays readable. Text that came
from a model or a data set is never taken for markup.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

LOG_WIDTH = 120  # columns of a log, where no terminal says
LINE_EVERY = 10.0  # seconds between lines of a bar that is not on a terminal


class Advance(Protocol):
    """Says how many more units of a bar are done, with a note to show beside it."""

    def __call__(self, n: int, note: str = "") -> None:
        """Advance by ``n`` units."""
        ...


class Rate:
    """Tokens a second since it was made, as a note."""

    def __init__(self) -> None:
        self.began, self.tokens = time.monotonic(), 0

    def __call__(self, tokens: int) -> str:
        """Count tokens and return the rate as text."""
        self.tokens += tokens
        return f"{self.tokens / max(time.monotonic() - self.began, 1e-9):,.0f} tokens/s"


class Reporter:
    """Writes to standard error; ``quiet`` writes nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = LOG_WIDTH

    def heading(self, text: str) -> None:
        """Begin a part of the run."""
        self.console.print()
        self.console.print(Rule(Text(text, style="bold"), align="left", style="dim"))

    def line(self, text: str) -> None:
        """State a fact."""
        self.console.print(Text(text))

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a small table; the first column is left-aligned, the others right."""
        table = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, name in enumerate(columns):
            table.add_column(Text(name), justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """Show progress of ``total`` units; the yielded callable says how many more are done."""
        began, last = time.monotonic(), ""
        move: Callable[[int, str], None]

        def advance(n: int, note: str = "") -> None:
            nonlocal last
            last = f", {note}" if note else last
            move(n, last)

        if self.console.is_terminal and not self.console.quiet:
            columns = [
                TextColumn("  {task.description}", markup=False),
                BarColumn(24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            ]
            with Progress(
                *columns, TextColumn("left"), TimeRemainingColumn(), console=self.console, transient=True
            ) as bars:
                task = bars.add_task(label, total=total)
                move = lambda n, note: bars.update(task, advance=n, description=label + note)  # noqa: E731
                yield advance
        else:
            move = self._lines(label, total, began)
            yield advance
        self.line(f"  {label}: {total} in {time.monotonic() - began:.1f} s{last}")

    def _lines(self, label: str, total: int, began: float) -> Callable[[int, str], None]:
        done, last = 0, began

        def advance(n: int, note: str) -> None:
            nonlocal done, last
            done += n
            now = time.monotonic()
            if now - last >= LINE_EVERY and total / 20 <= done < total:
                last = now
                self.line(f"  {label}: {done}/{total}, {(now - began) / done * (total - done):.0f} s left{note}")

        return advance
