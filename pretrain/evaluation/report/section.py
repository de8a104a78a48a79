"""What a report is made of, whoever shows it: a page has sections, a section cards. html.py and markdown.py show it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.evaluation.report.charts import HeatMap, Line, LineChart

NATS = "nats per masked token"

TableCell = str | tuple[str, str]
"""Text, or text and whether it is `good` or `bad` news, which is said only where it is sure."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[TableCell]]

    @property
    def texts(self) -> list[list[str]]:
        """The rows as plain text."""
        return [[cell if isinstance(cell, str) else cell[0] for cell in row] for row in self.rows]


@dataclass(frozen=True)
class Facts:
    """Names, and what is said of each."""

    entries: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Card:
    """A titled box."""

    title: str
    content: Table | Facts | LineChart | HeatMap
    note: str = ""
    wide: bool = False
    """Takes the whole width of a page."""
    folded: bool = False
    """Shows its title alone until it is opened."""


@dataclass(frozen=True)
class ReportSection:
    """A heading, what the section shows, and cards."""

    title: str
    prose: str = ""
    cards: Sequence[Card] = ()
    points: Sequence[str] = ()
    """Sentences of a list."""


@dataclass(frozen=True)
class Page:
    """A whole document."""

    title: str
    kind: str
    """A word or two over the heading."""
    heading: str
    sections: Sequence[ReportSection]
    footer: str
    facts: str = ""
    """What the document is about, in one line."""
    lead: str = ""
    """The answer, in a sentence or two."""
    figures: Sequence[tuple[str, str]] = ()
    """The most important numbers, with a line about each."""

    @property
    def pictures(self) -> dict[str, LineChart]:
        """Charts that have a picture, by its name."""
        charts = [c.content for s in self.sections for c in s.cards if isinstance(c.content, LineChart)]
        return {chart.picture: chart for chart in charts if chart.picture}


def signed(value: float, interval: tuple[float, float] | None, *, up_is_good: bool = True) -> TableCell:
    """Return a difference in nats, good or bad news where its interval leaves out zero."""
    if interval is None or interval[0] <= 0 <= interval[1]:
        return f"{value:+.3f}"
    return f"{value:+.3f}", "good" if (interval[0] > 0) == up_is_good else "bad"


def over_context(lines: Sequence[Line], y_label: str, *, zero: bool = True, **more: Any) -> LineChart:
    """Return curves over the context length in multiples of the training length."""
    return LineChart(lines, "context", y_label, log_x=True, x_name=lambda x: f"{x:g}x", zero=zero, **more)
