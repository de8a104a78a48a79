"""Charts as inline SVG: lines with bands, heat maps. Text in, text out; no library, no script, no network.

A chart is drawn 480 units wide, so that its letters stay readable when a phone shows it at 340 pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 480, 300


_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 44


COLOURS = ("#5b3df5", "#d9480f", "#0b7285", "#c2255c", "#2b8a3e", "#8f6b00", "#495057", "#1971c2", "#862e9c")


GRID, INK, SOFT = "#e5e7ee", "#1b1f2a", "#5c6475"


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[tuple[float, float]]
    """Ascending in x."""
    band: Sequence[tuple[float, float]] = field(default=())
    """Low and high at each point."""
    dashed: bool = False
    muted: bool = False
    """In grey, for a reference."""
    plain: bool = False
    """Without a dot at every point."""


def number(value: float) -> str:
    """For an axis: 3 significant digits, no trailing zeros."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    x_ticks: Sequence[float] | None = None,
    x_name: Callable[[float], str] = number,
    zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    title: str = "",
) -> str:
    """Curves over a common axis.

    Args:
        lines: at least one, with at least one point.
        x_label: under the axis.
        y_label: above the axis.
        log_x: doublings are equally far apart.
        x_ticks: where the axis is labelled; by default everywhere where the first line has a point.
        x_name: how a tick is written.
        zero: the axis includes zero, drawn as a line.
        marks: vertical lines with a word each.
        title: for readers of the page that cannot see it.
    """
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points] + [y for line in lines for band in line.band for y in band]
    ys = [y for y in ys if math.isfinite(y)] + ([0.0] if zero else [])
    low, high, ticks = _nice(min(ys), max(ys))
    to_x = _scale(min(xs), max(xs), _LEFT + 8, WIDTH - _RIGHT - 8, log_x)
    to_y = _scale(low, high, HEIGHT - _BOTTOM, _TOP + 12)
    parts = [_frame(ticks, to_y, y_label, zero)]
    ticks_x = x_ticks if x_ticks is not None else dict.fromkeys(x for x, _ in lines[0].points)
    parts += [_text(to_x(x), HEIGHT - _BOTTOM + 16, x_name(x), "middle") for x in ticks_x]
    parts.append(_text((WIDTH + _LEFT) / 2, HEIGHT - 8, x_label, "middle", "label"))
    for x, word in marks:
        at = to_x(x)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" class="mark"/>')
        parts.append(_text(at + 4, _TOP + 9, word, "start", "word"))
    coloured = 0
    for line in lines:
        colour = "#868e96" if line.muted else COLOURS[coloured % len(COLOURS)]
        coloured += not line.muted
        parts.append(_curve(line, colour, to_x, to_y, x_name))
    return _svg("".join(parts), title or f"{y_label} by {x_label}") + legend(lines)


def _curve(
    line: Line,
    colour: str,
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    x_name: Callable[[float], str],
) -> str:
    points = [(to_x(x), to_y(y)) for x, y in line.points]
    parts = []
    if line.band:
        upper = [f"{to_x(x):.1f},{to_y(high):.1f}" for (x, _), (_, high) in zip(line.points, line.band, strict=True)]
        lower = [f"{to_x(x):.1f},{to_y(low):.1f}" for (x, _), (low, _) in zip(line.points, line.band, strict=True)]
        parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" opacity="0.15"/>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if line.dashed or line.muted else ""
    width = 1.4 if line.muted else 2.2
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>')
    if not line.muted and not line.plain:
        for (x, y), (at, value) in zip(points, line.points, strict=True):
            tip = escape(f"{line.label}, {x_name(at)}: {value:.3f}")
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"><title>{tip}</title></circle>')
    return "".join(parts)


def legend(lines: Sequence[Line]) -> str:
    """Which colour is which; nothing for a single line."""
    if len(lines) < 2:
        return ""
    coloured, items = 0, []
    for line in lines:
        colour = "#868e96" if line.muted else COLOURS[coloured % len(COLOURS)]
        coloured += not line.muted
        kind = "dashed" if line.dashed or line.muted else "solid"
        items.append(f'<li><i style="border-top:3px {kind} {colour}"></i>{escape(line.label)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


@dataclass(frozen=True)
class HeatMap:
    """A table in colours."""

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    """By row; None where there is nothing."""
    low: float
    high: float
    middle: float | None = None
    """The value drawn white, with one colour below it and another above; None: white is `low`."""
    form: str = ".2f"


def heat_map(chart: HeatMap, *, x_label: str, y_label: str, title: str = "") -> str:
    """Cells with their numbers in them."""
    left, top, bottom = 18 + 7 * max(len(row) for row in chart.rows), 22, 40
    cell_w, cell_h = (WIDTH - left - 8) / len(chart.columns), 26
    height = top + cell_h * len(chart.rows) + bottom
    size = 11 if cell_w >= 34 else 9
    parts = [_text(2, 12, y_label, "start", "label")]
    for number_of_row, (row, values) in enumerate(zip(chart.rows, chart.values, strict=True)):
        y = top + cell_h * number_of_row
        parts.append(_text(left - 6, y + cell_h / 2 + 4, row, "end"))
        for column, value in enumerate(values):
            x = left + cell_w * column
            shown = value is not None and math.isfinite(value)
            colour, ink = _heat(chart, value) if shown and value is not None else ("#f4f5f8", SOFT)
            tip = escape(f"{row}, {chart.columns[column]}: {value:{chart.form}}" if shown else "not measured")
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell_w - 2:.1f}" height="{cell_h - 2:.1f}" rx="3" '
                f'fill="{colour}"><title>{tip}</title></rect>'
            )
            if shown and cell_w >= 24:
                style = f'text-anchor="middle" style="font-size:{size}px;fill:{ink}"'
                word = f"{value:{chart.form}}"
                parts.append(f'<text x="{x + cell_w / 2:.1f}" y="{y + cell_h / 2 + 4:.1f}" {style}>{word}</text>')
    base = top + cell_h * len(chart.rows)
    for column, name in enumerate(chart.columns):
        parts.append(_text(left + cell_w * (column + 0.5), base + 15, name, "middle"))
    parts.append(_text((WIDTH + left) / 2, base + 33, x_label, "middle", "label"))
    return _svg("".join(parts), title or f"{y_label} by {x_label}", height)


def _heat(chart: HeatMap, value: float) -> tuple[str, str]:
    """Colour of a cell, and of the ink on it."""
    white = chart.low if chart.middle is None else chart.middle
    if value >= white:
        share, end = (value - white) / max(chart.high - white, 1e-9), (73, 48, 214)
    elif chart.middle is None:
        return "#ffffff", SOFT
    else:
        share, end = (white - value) / max(white - chart.low, 1e-9), (201, 66, 14)
    share = min(1.0, max(0.0, share)) ** 0.8
    mixed = [round(255 + (part - 255) * share) for part in end]
    return f"rgb({mixed[0]},{mixed[1]},{mixed[2]})", "#ffffff" if share > 0.55 else INK


def _frame(ticks: Sequence[float], to_y: Callable[[float], float], y_label: str, zero: bool) -> str:
    parts = [_text(2, 11, y_label, "start", "label")]
    for tick in ticks:
        y = to_y(tick)
        style = "zero" if zero and tick == 0 else "grid"
        parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="{style}"/>')
        parts.append(_text(_LEFT - 6, y + 4, number(tick), "end"))
    return "".join(parts)


def _svg(content: str, title: str, height: float = HEIGHT) -> str:
    name = escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{name}">{content}</svg>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(text)}</text>'


def _scale(low: float, high: float, first: float, last: float, log: bool = False) -> Callable[[float], float]:
    """From values to the page; a single value lies in the middle."""

    def place(value: float) -> float:
        a, b, v = (math.log2(low), math.log2(high), math.log2(value)) if log else (low, high, value)
        return (first + last) / 2 if a == b else first + (v - a) / (b - a) * (last - first)

    return place


def _nice(low: float, high: float, count: int = 5) -> tuple[float, float, list[float]]:
    """Round bounds around the values, and round ticks between them."""
    span = (high - low) or max(abs(high), 1.0) * 0.1
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        last += 1
    return first * step, last * step, [k * step for k in range(first, last + 1)]
