"""Charts as inline SVG for a page. Text in, text out; no library, no script, no network.

A chart is drawn 480 units wide, so that its letters stay readable when a phone shows it at 340 pixels.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

from pretrain.evaluation.report.charts import HeatMap, Line, LineChart, short_number

_WIDTH, _HEIGHT = 480, 300

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 44

_INK, _SOFT = "#1b1f2a", "#5c6475"

_Place = Callable[[float], float]


def line_chart_svg(chart: LineChart) -> str:
    """Return the curves, and which colour is which."""
    xs = [x for line in chart.lines for x, _ in line.points]
    ys = [y for line in chart.lines for pairs in (line.points, line.band) for _, y in pairs]
    ys += [low for line in chart.lines for low, _ in line.band]
    ys = [y for y in ys if math.isfinite(y)] + ([0.0] if chart.zero else [])
    low, high, y_ticks = _round_bounds(min(ys), max(ys))
    to_x = _scale(min(xs), max(xs), _LEFT + 8, _WIDTH - _RIGHT - 8, chart.log_x)
    to_y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP + 12)
    parts = [_text(2, 11, chart.y_label, "start", "label")]
    for tick in y_ticks:
        y, style = to_y(tick), "zero" if chart.zero and tick == 0 else "grid"
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="{style}"/>')
        parts.append(_text(_LEFT - 6, y + 4, short_number(tick), "end"))
    parts += [_text(to_x(x), _HEIGHT - _BOTTOM + 16, chart.x_name(x), "middle") for x in chart.ticks]
    parts.append(_text((_WIDTH + _LEFT) / 2, _HEIGHT - 8, chart.x_label, "middle", "label"))
    for x, word in chart.marks:
        at = to_x(x)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" class="mark"/>')
        parts.append(_text(at + 4, _TOP + 9, word, "start", "word"))
    parts += [_curve(line, colour, to_x, to_y, chart.x_name) for line, colour in chart.coloured]
    return _svg("".join(parts), f"{chart.y_label} by {chart.x_label}", _HEIGHT) + _legend(chart)


def _curve(line: Line, colour: str, to_x: _Place, to_y: _Place, x_name: Callable[[float], str]) -> str:
    parts, xs = [], [to_x(x) for x, _ in line.points]
    if line.band:
        upper = [f"{x:.1f},{to_y(high):.1f}" for x, (_, high) in zip(xs, line.band, strict=True)]
        lower = [f"{x:.1f},{to_y(low):.1f}" for x, (low, _) in zip(xs, line.band, strict=True)]
        parts.append(f'<polygon points="{" ".join(upper + lower[::-1])}" fill="{colour}" opacity="0.15"/>')
    path = " ".join(f"{x:.1f},{to_y(y):.1f}" for x, (_, y) in zip(xs, line.points, strict=True))
    dash = ' stroke-dasharray="5 4"' if line.dashed or line.muted else ""
    width = 1.4 if line.muted else 2.2
    parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dash}/>')
    if not line.muted and not line.plain:
        for x, (at, value) in zip(xs, line.points, strict=True):
            tip = escape(f"{line.label}, {x_name(at)}: {value:.3f}")
            y = to_y(value)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{colour}"><title>{tip}</title></circle>')
    return "".join(parts)


def _legend(chart: LineChart) -> str:
    """Return which colour is which; nothing for a single line."""
    if len(chart.lines) < 2:
        return ""
    items = [
        f'<li><i style="border-top:3px {"dashed" if line.dashed or line.muted else "solid"} {colour}"></i>'
        f"{escape(line.label)}</li>"
        for line, colour in chart.coloured
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def heat_map_svg(chart: HeatMap) -> str:
    """Return cells with their numbers in them."""
    left, top, bottom = 18 + 7 * max(len(row) for row in chart.rows), 22, 40
    width, height = (_WIDTH - left - 8) / len(chart.columns), 26
    parts = [_text(2, 12, chart.y_label, "start", "label")]
    for number, (row, values) in enumerate(zip(chart.rows, chart.values, strict=True)):
        y = top + height * number
        parts.append(_text(left - 6, y + height / 2 + 4, row, "end"))
        for column, value in enumerate(values):
            parts.append(_heat_cell(chart, f"{row}, {chart.columns[column]}", value, left + width * column, y, width))
    base = top + height * len(chart.rows)
    parts += [_text(left + width * (k + 0.5), base + 15, name, "middle") for k, name in enumerate(chart.columns)]
    parts.append(_text((_WIDTH + left) / 2, base + 33, chart.x_label, "middle", "label"))
    return _svg("".join(parts), f"{chart.y_label} by {chart.x_label}", base + bottom)


def _heat_cell(chart: HeatMap, name: str, value: float | None, x: float, y: float, width: float) -> str:
    shown = value is not None and math.isfinite(value)
    colour, ink = _heat(chart, value) if shown and value is not None else ("#f4f5f8", _SOFT)
    tip = escape(f"{name}: {value:{chart.form}}" if shown else "not measured")
    cell = (
        f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="24.0" rx="3" fill="{colour}">'
        f"<title>{tip}</title></rect>"
    )
    if not shown or width < 24:
        return cell
    style = f'text-anchor="middle" style="font-size:{11 if width >= 34 else 9}px;fill:{ink}"'
    return f'{cell}<text x="{x + width / 2:.1f}" y="{y + 17:.1f}" {style}>{value:{chart.form}}</text>'


def _heat(chart: HeatMap, value: float) -> tuple[str, str]:
    """Return the colour of a cell, and of the ink on it."""
    white = chart.low if chart.middle is None else chart.middle
    if value >= white:
        share, end = (value - white) / max(chart.high - white, 1e-9), (73, 48, 214)
    elif chart.middle is None:
        return "#ffffff", _SOFT
    else:
        share, end = (white - value) / max(white - chart.low, 1e-9), (201, 66, 14)
    share = min(1.0, max(0.0, share)) ** 0.8
    red, green, blue = (round(255 + (part - 255) * share) for part in end)
    return f"rgb({red},{green},{blue})", "#ffffff" if share > 0.55 else _INK


def _svg(content: str, title: str, height: float) -> str:
    """`title` is for readers of the page who cannot see it."""
    name = escape(title, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{name}">{content}</svg>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(text)}</text>'


def _scale(low: float, high: float, first: float, last: float, log: bool = False) -> _Place:
    """Map values to the page; a single value lies in the middle."""

    def place(value: float) -> float:
        a, b, v = (math.log2(low), math.log2(high), math.log2(value)) if log else (low, high, value)
        return (first + last) / 2 if a == b else first + (v - a) / (b - a) * (last - first)

    return place


def _round_bounds(low: float, high: float, count: int = 5) -> tuple[float, float, Sequence[float]]:
    """Return round bounds around the values, and round ticks between them."""
    span = (high - low) or max(abs(high), 1.0) * 0.1
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        last += 1
    return first * step, last * step, [k * step for k in range(first, last + 1)]
