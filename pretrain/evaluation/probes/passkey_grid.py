"""The whole grid of the passkey probe, its tables and its plot. A cell and its training are in passkey.py."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from pretrain.evaluation.context.tasks import CANDIDATES, KEY
from pretrain.evaluation.probes.grid import COLOURS, Attention, Report, markdown_table, train_grid, write_results
from pretrain.evaluation.probes.passkey import (
    READINGS,
    Cell,
    CellResult,
    PasskeySettings,
    Pattern,
    restore,
    train_cell,
)
from pretrain.evaluation.report.titles import INTERVENTION_TITLES, Intervention

PATTERNS: dict[Pattern, str] = {"local_global": "local-global", "rotary": "rotary", "none": "no positions"}


Measure = Literal["keys", "tokens", "tokens_among_candidates"]
"""What is counted; see `Found`."""


MEASURES: tuple[Measure, ...] = ("keys", "tokens", "tokens_among_candidates")


TITLES: dict[Measure, str] = {
    "keys": "Rows in which the whole key was found, in percent:",
    "tokens": "Tokens of the keys that were right, in percent:",
    "tokens_among_candidates": "Tokens of the keys that were right among the candidates, in percent:",
}


CHANCE: dict[Measure, float] = {
    "keys": CANDIDATES**-KEY,
    "tokens": 1 / CANDIDATES,
    "tokens_among_candidates": 1 / CANDIDATES,
}
"""Of an encoder that knows the candidates and guesses."""


def run_passkey(
    folder: Path,
    kinds: Sequence[tuple[Attention, Pattern]],
    seeds: Sequence[int],
    settings: PasskeySettings,
    *,
    processes: int = 1,
    report: Report = lambda *_: None,
) -> list[CellResult]:
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
    grid = [Cell(attention, pattern, seed) for attention, pattern in kinds for seed in seeds]
    results = train_grid(folder, grid, settings, train_cell, restore, processes=processes, report=report)
    document = {
        "probe": "passkey",
        "chance": CHANCE,
        "settings": asdict(settings),
        "cells": [asdict(result) for result in results],
    }
    tables = [
        f"{TITLES[measure]}\n\n{markdown_table(columns(settings), table_rows(results, measure))}"
        for measure in MEASURES
    ]
    write_results(folder, document, "\n".join(tables), _plot(results))
    return results


def share_found(results: Sequence[CellResult], measure: Measure, reading: Intervention, factor: int) -> list[float]:
    """Of every cell, the share found by a reading in rows of a length; every distance, depth and side counts alike."""
    chosen = [[f for f in result.found if (f.reading, f.factor) == (reading, factor)] for result in results]
    per_row = 1 if measure == "keys" else KEY
    return [sum(getattr(f, measure) for f in found) / (per_row * sum(f.rows for f in found)) for found in chosen]


def columns(settings: PasskeySettings) -> tuple[str, ...]:
    """Of the tables."""
    return ("attention", "layers", "reading", *(f"{factor}x" for factor in settings.factors), "seeds")


def table_rows(results: Sequence[CellResult], measure: Measure) -> list[tuple[str, ...]]:
    """A row of text per kind and reading: the mean over the seeds and, if there are several, lowest to highest."""
    rows = []
    for (attention, pattern), cells in _by_kind(results).items():
        for reading in READINGS:
            shares = [share_found(cells, measure, reading, factor) for factor in cells[0].settings.factors]
            texts = (_percent(of_seeds) for of_seeds in shares)
            name = "as trained" if reading == "plain" else "log length"
            rows.append((attention.replace("_", "-"), PATTERNS[pattern], name, *texts, str(len(cells))))
    chance = f"{100 * CHANCE[measure]:.2g}"
    return [*rows, ("chance", "", "", *(chance for _ in results[0].settings.factors), "")]


def _percent(shares: Sequence[float]) -> str:
    mean = f"{100 * sum(shares) / len(shares):.1f}"
    return mean if len(shares) == 1 else f"{mean} ({100 * min(shares):.0f} to {100 * max(shares):.0f})"


def _by_kind(results: Sequence[CellResult]) -> dict[tuple[Attention, Pattern], list[CellResult]]:
    kinds: dict[tuple[Attention, Pattern], list[CellResult]] = {}
    for result in results:
        kinds.setdefault((result.cell.attention, result.cell.pattern), []).append(result)
    return kinds


_LINES: dict[Pattern, str] = {"local_global": "-", "rotary": "--", "none": ":"}


def _plot(results: Sequence[CellResult]) -> Figure:
    """Whole keys found, over the length of the rows: a panel per reading, a line per kind, a band over its seeds."""
    figure = Figure(figsize=(10.5, 4.9), layout="constrained")
    panels = figure.subplots(1, len(READINGS), sharey=True)
    settings = results[0].settings
    lengths = [factor * settings.training_length for factor in settings.factors]
    for axes, reading in zip(panels, READINGS, strict=True):
        for (attention, pattern), cells in _by_kind(results).items():
            shares = [share_found(cells, "keys", reading, factor) for factor in settings.factors]
            colour, name = COLOURS[attention], f"{attention.replace('_', '-')}, {PATTERNS[pattern]}"
            means = [sum(s) / len(s) for s in shares]
            axes.fill_between(lengths, [min(s) for s in shares], [max(s) for s in shares], color=colour, alpha=0.12)
            axes.plot(lengths, means, color=colour, linestyle=_LINES[pattern], marker=".", label=name)
        axes.axhline(CHANCE["keys"], color="black", linewidth=0.8, linestyle=":", label="chance")
        axes.axvline(settings.training_length, color="black", linewidth=0.8, alpha=0.4, label="longest row trained on")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set(xlabel="length of the row in tokens", ylim=(-0.02, 1.02), title=INTERVENTION_TITLES[reading])
    panels[0].set_ylabel("whole keys found")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    return figure
