"""What a chart shows: curves over a common axis, or a table in colours. svg.py and pictures.py draw it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

CURVE_COLOURS = ("#5b3df5", "#d9480f", "#0b7285", "#c2255c", "#2b8a3e", "#8f6b00", "#495057", "#1971c2", "#862e9c")

MUTED = "#868e96"


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[tuple[float, float]]
    """Ascending in x."""
    band: Sequence[tuple[float, float]] = ()
    """Low and high at each point."""
    dashed: bool = False
    muted: bool = False
    """Grey and dashed, for a reference."""
    plain: bool = False
    """Drawn without a dot at every point."""


def short_number(value: float) -> str:
    """Return a number for an axis: 3 significant digits, no trailing zeros."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class LineChart:
    """Curves over a common axis: at least one, with at least one point."""

    lines: Sequence[Line]
    x_label: str
    y_label: str
    log_x: bool = False
    """Doublings are equally far apart."""
    x_ticks: Sequence[float] = ()
    """Places where the axis is labelled; by default every place with a point."""
    x_name: Callable[[float], str] = short_number
    """How a tick is written."""
    zero: bool = False
    """The y axis includes zero, drawn as a line."""
    marks: Sequence[tuple[float, str]] = ()
    """Vertical lines, with a word each."""
    picture: str = ""
    """Name of its PNG file beside the report, if it has one."""

    @property
    def ticks(self) -> list[float]:
        """Places where the x axis is labelled."""
        return list(self.x_ticks or sorted({x for line in self.lines for x, _ in line.points}))

    @property
    def coloured(self) -> Iterator[tuple[Line, str]]:
        """The lines, each with its colour."""
        colours = iter(CURVE_COLOURS * (1 + len(self.lines) // len(CURVE_COLOURS)))
        return ((line, MUTED if line.muted else next(colours)) for line in self.lines)


@dataclass(frozen=True)
class HeatMap:
    """A table in colours."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    """Values by row; None where there is nothing."""
    x_label: str
    y_label: str
    low: float
    high: float
    middle: float | None = None
    """The value drawn white, with one colour below it and another above; None: white is `low`."""
    form: str = ".2f"
    """Format of the values."""
