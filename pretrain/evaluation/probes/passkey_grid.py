"""The whole grid of the passkey probe, its tables and its plot. A cell and its training are in passkey.py."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from pretrain.evaluation.context.plan import Progress
from pretrain.evaluation.context.tasks import CANDIDATES, KEY
from pretrain.evaluation.probes.grid import by_kind, train_grid, write_results
from pretrain.evaluation.probes.passkey import (
    COMPARED,
    PasskeyCell,
    PasskeyResult,
    PasskeySettings,
    Pattern,
    restore_passkey,
    train_passkey,
)
from pretrain.evaluation.report.charts import Line, LineChart
from pretrain.evaluation.report.markdown import markdown_table
from pretrain.evaluation.report.pictures import draw_chart
from pretrain.evaluation.report.section import Table
from pretrain.evaluation.report.titles import INTERVENTION_TITLES, Intervention
from pretrain.model.kernels import Kind

PATTERNS: dict[Pattern, str] = {"local_global": "local-global", "rotary": "rotary", "none": "no positions"}

Measure = Literal["keys", "tokens", "tokens_among_candidates"]
"""What is counted; see `Found`."""

MEASURES: tuple[Measure, ...] = ("keys", "tokens", "tokens_among_candidates")

MEASURE_TITLES: dict[Measure, str] = {
    "keys": "Rows in which the whole key was found, in percent:",
    "tokens": "Tokens of the keys that were right, in percent:",
    "tokens_among_candidates": "Tokens of the keys that were right among the candidates, in percent:",
}

PASSKEY_CHANCE: dict[Measure, float] = {
    "keys": CANDIDATES**-KEY,
    "tokens": 1 / CANDIDATES,
    "tokens_among_candidates": 1 / CANDIDATES,
}
"""Shares that an encoder finds which knows the candidates and guesses."""


def run_passkey(
    folder: Path,
    kinds: Sequence[tuple[Kind, Pattern]],
    seeds: Sequence[int],
    settings: PasskeySettings,
    *,
    processes: int = 1,
    report: Progress = lambda *_: None,
) -> list[PasskeyResult]:
    """Train the grid and write results.json, table.md and accuracy.png.

    Every finished cell is a file in `folder`/cells, and is not trained again.

    Args:
        folder: where everything goes.
        kinds: attention and pattern of the encoders to compare.
        seeds: of weights and rows.
        settings: of each training.
        processes: how many cells to train at once; the results do not depend on it.
        report: called with (what, done, total), in cells.

    Raises:
        UserError: the folder holds cells of other settings.
    """
    grid = [PasskeyCell(attention, pattern, seed) for attention, pattern in kinds for seed in seeds]
    results = train_grid(folder, grid, settings, train_passkey, restore_passkey, processes=processes, report=report)
    document = {
        "probe": "passkey",
        "chance": PASSKEY_CHANCE,
        "settings": asdict(settings),
        "cells": [asdict(result) for result in results],
    }
    tables = [f"{MEASURE_TITLES[m]}\n\n{markdown_table(passkey_table(results, m))}" for m in MEASURES]
    write_results(folder, document, "\n\n".join(tables), _plot(results))
    return results


def share_found(
    results: Sequence[PasskeyResult], measure: Measure, intervention: Intervention, factor: int
) -> list[float]:
    """Return the share found by every cell in rows of a length; every distance, depth and side counts alike."""
    chosen = [[f for f in result.found if (f.reading, f.factor) == (intervention, factor)] for result in results]
    per_row = 1 if measure == "keys" else KEY
    return [sum(getattr(f, measure) for f in found) / (per_row * sum(f.rows for f in found)) for found in chosen]


def passkey_table(results: Sequence[PasskeyResult], measure: Measure) -> Table:
    """Return a row per kind and intervention: the mean over the seeds and, if there are several, lowest to highest."""
    rows, factors = [], results[0].settings.factors
    for (attention, pattern), of_kind in by_kind(results).items():
        for intervention in COMPARED:
            texts = [_percent(share_found(of_kind, measure, intervention, factor)) for factor in factors]
            name = "as trained" if intervention == "plain" else "log length"
            rows.append((attention.replace("_", "-"), PATTERNS[pattern], name, *texts, str(len(of_kind))))
    rows.append(("chance", "", "", *(f"{100 * PASSKEY_CHANCE[measure]:.2g}" for _ in factors), ""))
    return Table(("attention", "layers", "intervention", *(f"{factor}x" for factor in factors), "seeds"), rows)


def _percent(shares: Sequence[float]) -> str:
    mean = f"{100 * sum(shares) / len(shares):.1f}"
    return mean if len(shares) == 1 else f"{mean} ({100 * min(shares):.0f} to {100 * max(shares):.0f})"


def _plot(results: Sequence[PasskeyResult]) -> Figure:
    """Draw whole keys found over the length of the rows: a panel per intervention, a line per kind, a band of seeds."""
    figure = Figure(figsize=(10.5, 4.9), layout="constrained")
    panels = figure.subplots(1, len(COMPARED), sharey=True)
    for axes, intervention in zip(panels, COMPARED, strict=True):
        draw_chart(axes, _chart(results, intervention), INTERVENTION_TITLES[intervention])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _chart(results: Sequence[PasskeyResult], intervention: Intervention) -> LineChart:
    factors, lines = results[0].settings.factors, []
    for (attention, pattern), of_kind in by_kind(results).items():
        shares = [share_found(of_kind, "keys", intervention, factor) for factor in factors]
        points = [(factor, sum(s) / len(s)) for factor, s in zip(factors, shares, strict=True)]
        name = f"{attention.replace('_', '-')}, {PATTERNS[pattern]}"
        lines.append(Line(name, points, [(min(s), max(s)) for s in shares], dashed=pattern != "local_global"))
    lines.append(Line("chance", [(factor, PASSKEY_CHANCE["keys"]) for factor in factors], muted=True))
    return LineChart(lines, "length of the row", "whole keys found", log_x=True, x_name=lambda x: f"{x:g}x", zero=True)
