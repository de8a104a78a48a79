"""What came out of a ladder: a power law through the losses of its sizes, how well it foretold the largest, the next.

The law is a straight line through the logarithms of loss and compute (Kaplan et al., arXiv 2001.08361). The loss that
no model gets below is not fitted: over the few sizes of a ladder it cannot be told from the slope. So the law is good
for the next rung, and too hopeful far above; the size left out says how good.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from launch.grid.rungs import SIZE, Ladder, Rung, read_ladder
from launch.grid.sweep_report import Result, read_results, spread
from launch.terminal.console import compact
from launch.terminal.tables import table
from pretrain.errors import UserError
from pretrain.files import write_json, write_text

LADDER_MARKDOWN, LADDER_RESULTS, LADDER_PLOT = "ladder.md", "results.json", "ladder.png"
_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t, 97.5 %, for 1 to 10 degrees of freedom; for more of them the last is used, a little too wide."""
FAR = 20.0
"""Times the compute of the largest training, beyond which a prediction comes with a warning."""


@dataclass(frozen=True)
class FittedValue:
    """A value and its 95 % interval; without one where there is nothing to judge the spread by."""

    value: float
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        text = f"{self.value:.3f}"
        return f"{text} ({self.interval[0]:.3f} to {self.interval[1]:.3f})" if self.interval else text


@dataclass(frozen=True)
class PowerLaw:
    """loss = e^intercept x flops^-exponent, by least squares through the logarithms."""

    intercept: float
    exponent: float
    points: int
    mean: float
    """Mean of the logarithms of compute."""
    squares: float
    """Sum of the squared distances of these logarithms from their mean."""
    deviation: float | None
    """Standard deviation of the residuals; None for two points."""

    @property
    def _t(self) -> float:
        return _T_975[min(self.points - 2, len(_T_975)) - 1]

    def exponent_estimate(self) -> FittedValue:
        """The exponent with its interval."""
        if self.deviation is None:
            return FittedValue(self.exponent, None)
        half = self._t * self.deviation / math.sqrt(self.squares)
        return FittedValue(self.exponent, (self.exponent - half, self.exponent + half))

    def predict(self, flops: float) -> FittedValue:
        """The loss of one new training of so many FLOPs, in nats, with its prediction interval."""
        x = math.log(flops)
        value = self.intercept - self.exponent * x
        if self.deviation is None:
            return FittedValue(math.exp(value), None)
        half = self._t * self.deviation * math.sqrt(1 + 1 / self.points + (x - self.mean) ** 2 / self.squares)
        return FittedValue(math.exp(value), (math.exp(value - half), math.exp(value + half)))


def fit_power_law(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit a power law through points of at least two different amounts of compute; losses in nats.

    Raises:
        ValueError: fewer than two amounts.
    """
    xs, ys = [math.log(value) for value in flops], [math.log(value) for value in losses]
    if len(set(xs)) < 2:
        raise ValueError("a law needs two amounts of compute")
    mean_x, mean_y = statistics.mean(xs), statistics.mean(ys)
    squares = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / squares
    intercept = mean_y - slope * mean_x
    residuals = sum((y - intercept - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    deviation = math.sqrt(residuals / (len(xs) - 2)) if len(xs) > 2 else None
    return PowerLaw(intercept, -slope, len(xs), mean_x, squares, deviation)


@dataclass(frozen=True)
class Climbed:
    """A ladder and the final validation losses of its trainings, by size; sizes without a finished one are left out."""

    name: str
    ladder: Ladder
    losses: dict[str, list[float]]
    unfinished: list[str]
    """Names of the members without a final loss."""

    @property
    def rungs(self) -> list[Rung]:
        """Rungs with a loss, from the smallest on."""
        return [rung for rung in self.ladder.rungs if rung.size in self.losses]

    def law(self, rungs: Sequence[Rung]) -> PowerLaw | None:
        """Law through some of the rungs; None for fewer than two."""
        if len(rungs) < 2:
            return None
        points = [(rung.flops, loss) for rung in rungs for loss in self.losses[rung.size]]
        return fit_power_law([x for x, _ in points], [y for _, y in points])


def read_climbed(folder: Path, now: float) -> Climbed:
    """What became of a ladder's runs.

    Raises:
        UserError: this is no ladder, or none of its runs is finished.
    """
    ladder, losses, unfinished = read_ladder(folder), dict[str, list[float]](), list[str]()
    sizes = {rung.size for rung in ladder.rungs}
    for result in read_results(folder, now):
        if result.member.labels[SIZE] not in sizes:
            continue
        if _is_done(result, ladder):
            losses.setdefault(result.member.labels[SIZE], []).append(result.validation_losses[-1])
        else:
            unfinished.append(result.member.name)
    if not losses:
        raise UserError(f"no run of {folder} is finished yet; `diptych runs --folder {folder}` shows how far they are")
    return Climbed(folder.name, ladder, losses, unfinished)


def _is_done(result: Result, ladder: Ladder) -> bool:
    tokens = next(rung.tokens for rung in ladder.rungs if rung.size == result.member.labels[SIZE])
    return bool(result.tokens) and result.tokens[-1] >= tokens


def findings(climbed: Climbed) -> list[str]:
    """The law, the size left out, and the next, in sentences."""
    rungs, lines = climbed.rungs, []
    if climbed.unfinished:
        lines.append(f"Not finished, and left out: {', '.join(climbed.unfinished)}.")
    law = climbed.law(rungs)
    if law is None:
        return [*lines, "One size is no ladder yet: there is nothing to fit."]
    lines.append(f"Loss falls as a power of compute, with the exponent {law.exponent_estimate()}.")
    if law.deviation is None:
        lines.append("Two runs leave nothing to judge the spread by: no intervals. Add a size, or --seeds 1,2.")
    lines.append(_left_out(climbed))
    if (following := climbed.ladder.next_rung) is not None:
        times = following.flops / max(rung.flops for rung in rungs)
        lines.append(
            f"Next, {following.size}: {law.predict(following.flops)} after {compact(following.tokens, ' ')} tokens, "
            f"{following.flops:.2e} FLOPs, {times:.3g} times the largest training's"
            + (": so far beyond what was trained it is too hopeful." if times > FAR else ".")
        )
    if law.exponent <= 0:
        lines.append("The larger sizes are no better: too few tokens, or a learning rate that does not suit them.")
    return lines


def _left_out(climbed: Climbed) -> str:
    *smaller, largest = climbed.rungs
    law = climbed.law(smaller)
    if law is None:
        return "With two sizes none can be left out to check the law."
    foretold, measured = law.predict(largest.flops), statistics.mean(climbed.losses[largest.size])
    verdict = ""
    if foretold.interval:
        inside = foretold.interval[0] <= measured <= foretold.interval[1]
        verdict = ", inside the interval" if inside else ", OUTSIDE the interval: do not trust the next prediction"
    return (
        f"Left out, {largest.size}: foretold {foretold} by the smaller sizes, measured {measured:.3f} "
        f"({measured / foretold.value - 1:+.1%}){verdict}."
    )


def plan_table(name: str, ladder: Ladder) -> Table:
    """What is to be trained."""
    rows = [[r.size, compact(r.parameters, " "), compact(r.tokens, " "), f"{r.flops:.2e}"] for r in ladder.rungs]
    title = f"Ladder {name}, {ladder.tokens_per_parameter:.3g} tokens per parameter"
    return table(title, RUNG_COLUMNS[:4], rows)


RUNG_COLUMNS = ("size", "parameters", "tokens", "FLOPs", "validation loss", "runs")


def rung_rows(climbed: Climbed) -> list[list[str]]:
    """Cells of the table: a row for each rung, finished or not."""
    return [
        [
            rung.size,
            compact(rung.parameters, " "),
            compact(rung.tokens, " "),
            f"{rung.flops:.2e}",
            spread(climbed.losses.get(rung.size, [])),
            str(len(climbed.losses.get(rung.size, []))),
        ]
        for rung in climbed.ladder.rungs
    ]


def rungs_table(climbed: Climbed) -> Table:
    """Table for a terminal."""
    return table(f"Ladder {climbed.name}", RUNG_COLUMNS, rung_rows(climbed))


def write_report(folder: Path, climbed: Climbed) -> Path:
    """Write ladder.md, results.json and ladder.png; returns the first."""
    lines = [RUNG_COLUMNS, ("---",) * len(RUNG_COLUMNS), *rung_rows(climbed)]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    found = findings(climbed)
    text = "\n\n".join([f"# Ladder {climbed.name}", rows, *found, f"![loss over compute]({LADDER_PLOT})", _NOTE])
    write_text(folder / LADDER_MARKDOWN, f"{text}\n")
    write_json(folder / LADDER_RESULTS, {"format": 1, "losses": climbed.losses, "findings": found})
    _plot_losses(folder / LADDER_PLOT, climbed)
    return folder / LADDER_MARKDOWN


_NOTE = (
    "Final validation losses in nats per masked token, mean ± standard deviation over seeds. FLOPs of one training, "
    "triangles counted as triangles.\nIntervals are 95 %, of least squares through the logarithms: the spread of the "
    "exponent, and of one new training's loss."
)


def _plot_losses(path: Path, climbed: Climbed) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for rung in climbed.rungs:
        losses = climbed.losses[rung.size]
        axes.plot([rung.flops] * len(losses), losses, "o", color="#7c3aed", markersize=5)
        axes.annotate(rung.size, (rung.flops, max(losses)), xytext=(4, 6), textcoords="offset points")
    law, following = climbed.law(climbed.rungs), climbed.ladder.next_rung
    if law is not None:
        ends = (climbed.rungs[0].flops, following.flops if following else climbed.rungs[-1].flops)
        grid = [math.exp(math.log(ends[0]) + k / 50 * math.log(ends[1] / ends[0])) for k in range(51)]
        line = [law.predict(x) for x in grid]
        axes.plot(grid, [point.value for point in line], color="#6b7280", linewidth=1, label="power law")
        if law.deviation is not None:
            low, high = ([p.interval[k] for p in line if p.interval] for k in (0, 1))
            axes.fill_between(grid, low, high, color="#6b7280", alpha=0.15, label="95 %, one new training")
        if following:
            axes.plot(following.flops, line[-1].value, "o", fillstyle="none", color="#d97706", label=following.size)
        axes.legend(fontsize="small")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs of a training", ylabel="validation loss, nats")
    axes.set_title(f"Ladder {climbed.name}")
    axes.yaxis.set_major_formatter("{x:.2f}")
    axes.yaxis.set_minor_formatter("{x:.2f}")
    figure.savefig(path, dpi=120)
