"""Charts as matplotlib figures, for PNG files and TensorBoard."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pretrain.evaluation.report.charts import LineChart


def chart_figure(chart: LineChart, title: str, size: tuple[float, float] = (6.4, 4)) -> Figure:
    """Return a figure of one chart, `size` in inches."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw_chart(axes, chart, title)
    if len(chart.lines) > 1:
        axes.legend(fontsize=8)
    return figure


def draw_chart(axes: Axes, chart: LineChart, title: str) -> None:
    """Draw a chart without its legend on axes of any figure."""
    for line, colour in chart.coloured:
        xs, ys = zip(*line.points, strict=True)
        if line.band:
            low, high = zip(*line.band, strict=True)
            axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
        style, marker = "--" if line.dashed or line.muted else "-", "" if line.muted or line.plain else "."
        axes.plot(xs, ys, color=colour, linestyle=style, marker=marker, label=line.label)
    if chart.log_x:
        axes.set_xscale("log", base=2)
    axes.set_xticks(chart.ticks, [chart.x_name(x) for x in chart.ticks])
    axes.minorticks_off()
    for x, word in chart.marks:
        axes.axvline(x, color="gray", linewidth=0.8, linestyle=":")
        axes.text(x, 1, f" {word}", transform=axes.get_xaxis_transform(), fontsize=8, color="gray", va="top")
    if chart.zero:
        axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label, title=title)
