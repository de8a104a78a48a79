"""Tables for a terminal, made of what other parts report. Nothing is measured or read here."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


def table(
    title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, numbers_from: int = 1
) -> Table:
    """A plain table; columns from `numbers_from` on are aligned to the right. Brackets in a cell are no markup."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD)
    for position, column in enumerate(columns):
        made.add_column(column, justify="right" if position >= numbers_from else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return made


def fitting_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], dispensable: str
) -> Table:
    """A table, without the columns headed `dispensable` where the console is too narrow for them."""
    made = table(title, columns, rows)
    if Measurement.get(console, console.options.update(max_width=1000), made).maximum <= console.width:
        return made
    kept = [position for position, column in enumerate(columns) if column != dispensable]
    return table(title, [columns[k] for k in kept], [[row[k] for k in kept] for row in rows])


def number(value: float | None, form: str = ".3f") -> str:
    """A value that may not be known yet."""
    return "-" if value is None else format(value, form)
