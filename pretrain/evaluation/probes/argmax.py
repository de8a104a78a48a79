"""The argmax probe: does a kind of encoder know where its tokens stand?

It is that of the dual-triangle paper (arXiv 2604.18603): from 64 values, tell the index of the largest. A small encoder
of each kind is trained on it from scratch, on the CPU; what is measured is the kind, not a run.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.config.model import ModelConfig
from pretrain.evaluation.probes.grid import (
    COLOURS,
    Attention,
    Report,
    curve_steps,
    learning_rate_share,
    one_thread,
    train_grid,
    write_results,
)
from pretrain.evaluation.probes.grid import markdown_table as as_markdown
from pretrain.model.encoder import Encoder
from pretrain.model.layout import AttentionLayout

Positions = Literal["rotary", "learned", "none"]


LENGTH = 64
"""Values in a sequence, and indices to choose from."""


VALUES = 64
"""Values there are: 0 to 63."""


CHANCE = 1 / LENGTH


_BEGIN, _QUERY = VALUES, VALUES + 1
"""Symbols before and after the values; the answer is read at the latter."""


COLUMNS = ("attention", "positions", "accuracy", "lowest to highest", "times chance", "seeds")


@dataclass(frozen=True)
class ProbeSettings:
    """How each cell of the grid is trained; the defaults suit two cores."""

    steps: int = 1000
    batch_size: int = 32
    hidden_size: int = 32
    num_layers: int = 2
    """One to know the positions, one to read that of the largest."""
    num_heads: int = 4
    learning_rate: float = 1e-2
    weight_decay: float = 0.01
    warmup: float = 0.05
    """Share of the steps during which the learning rate rises."""
    decay: float = 0.4
    """Share of the steps, at the end, during which it falls to zero."""
    held_out: int = 2048
    """Sequences that the final accuracy is measured on."""
    held_out_seed: int = 2**31
    """Added to a cell's seed for these. A torch generator keeps 32 bits of its seed: larger ones come round again."""


@dataclass(frozen=True)
class Cell:
    """One training: a kind of encoder and a seed."""

    attention: Attention
    positions: Positions
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.attention}-{self.positions}-{self.seed}"


@dataclass(frozen=True)
class CellResult:
    """What became of a cell."""

    cell: Cell
    settings: ProbeSettings
    accuracy: float
    """Share of the held-out sequences answered rightly at the end."""
    loss: float
    """Nats per held-out sequence; log(64) = 4.159 is chance."""
    curve: list[tuple[int, float]]
    """(step, accuracy since the point before). Every batch is drawn anew, so this is accuracy on unseen sequences."""
    seconds: float


@dataclass(frozen=True)
class KindResult:
    """A kind of encoder, over its seeds."""

    attention: Attention
    positions: Positions
    mean: float
    lowest: float
    highest: float
    seeds: int


def draw_sequences(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw the task.

    The values are independent and uniform; a sequence whose largest value occurs twice is drawn again, so that the
    answer is unique. By symmetry it is uniform over the indices.

    Returns:
        The values, int64 [num, LENGTH], and the index of the largest, int64 [num].
    """
    values = torch.randint(VALUES, (num, LENGTH), generator=generator)
    while (tied := (values == values.amax(dim=1, keepdim=True)).sum(dim=1) > 1).any():
        values[tied] = torch.randint(VALUES, (int(tied.sum()), LENGTH), generator=generator)
    return values, values.argmax(dim=1)


class PositionProbe(nn.Module):
    """An encoder of [begin, values, query], and a linear read-out of its state at the query.

    Under bidirectional attention without positions the encoder is permutation-equivariant and the query is the same
    symbol in every sequence, so the answer cannot depend on the order of the values: the probe stays at chance,
    whatever its weights. Causal and dual-triangle attention can count how far a value is from either end.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.encoder = Encoder(model, VALUES + 2)
        self.read_out = nn.Linear(model.hidden_size, LENGTH)

    def forward(self, values: Tensor, layout: AttentionLayout) -> Tensor:
        """int64 [B, LENGTH] -> scores of the indices [B, LENGTH]; `layout` is that of `probe_layout(B)`."""
        begin, query = (torch.full((len(values), 1), symbol) for symbol in (_BEGIN, _QUERY))
        hidden = self.encoder(torch.cat((begin, values, query), dim=1), layout)
        return self.read_out(hidden[:, -1])


def probe_layout(rows: int) -> AttentionLayout:
    """The layout of `rows` sequences, each with its two symbols."""
    documents = torch.ones(rows, LENGTH + 2, dtype=torch.int64)
    positions = torch.arange(LENGTH + 2).expand(rows, -1)
    return AttentionLayout.from_batch(Batch(documents, documents, documents, positions))


def train_cell(cell: Cell, settings: ProbeSettings) -> CellResult:
    """Train one encoder and measure it, on one thread: so small, it gains nothing by a second.

    Equal on equal machines, since everything random comes from the seed.
    """
    with one_thread():
        return _train_cell(cell, settings)


def _train_cell(cell: Cell, settings: ProbeSettings) -> CellResult:
    started = time.monotonic()
    model = ModelConfig(
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        attention=cell.attention,
        positions=cell.positions,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        probe = PositionProbe(model)
    optimizer = torch.optim.AdamW(
        probe.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )

    def share(step: int) -> float:
        return learning_rate_share(step, settings.steps, settings.warmup, settings.decay)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    generator, layout = torch.Generator().manual_seed(cell.seed), probe_layout(settings.batch_size)
    points = curve_steps(settings.steps)
    curve: list[tuple[int, float]] = []
    right: list[Tensor] = []
    for step in range(1, settings.steps + 1):
        values, answer = draw_sequences(settings.batch_size, generator)
        scores = probe(values, layout)
        optimizer.zero_grad()
        F.cross_entropy(scores, answer).backward()
        nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right.append(scores.argmax(dim=1) == answer)
        if step in points:
            curve.append((step, float(torch.cat(right).double().mean())))
            right.clear()
    accuracy, loss = _measure(probe, cell.seed, settings)
    return CellResult(cell, settings, accuracy, loss, curve, round(time.monotonic() - started, 1))


@torch.inference_mode()
def _measure(probe: PositionProbe, seed: int, settings: ProbeSettings) -> tuple[float, float]:
    """Accuracy and loss on held-out sequences."""
    values, answer = draw_sequences(settings.held_out, torch.Generator().manual_seed(seed + settings.held_out_seed))
    scores = torch.cat([probe(part, probe_layout(len(part))) for part in values.split(256)])
    return float((scores.argmax(dim=1) == answer).double().mean()), float(F.cross_entropy(scores, answer))


# ------------------------------------------------------------------------------------------------- the whole grid


def run_argmax(
    folder: Path,
    attentions: Sequence[Attention],
    positions: Sequence[Positions],
    seeds: Sequence[int],
    settings: ProbeSettings,
    *,
    processes: int = 1,
    report: Report = lambda *_: None,
) -> list[KindResult]:
    """Train the grid and write results.json, table.md and accuracy.png.

    Every finished cell is a file in `folder`/cells, and is not trained again.

    Args:
        folder: where everything goes.
        attentions: kinds of attention; together with `positions` and `seeds` they span the grid.
        positions: kinds of positions.
        seeds: of weights and sequences.
        settings: of each training.
        processes: how many cells to train at once; the results do not depend on it.
        report: called with (what, done, total), in cells.

    Raises:
        UserError: the folder holds cells of other settings.
    """
    grid = [Cell(a, p, seed) for a in attentions for p in positions for seed in seeds]
    results = train_grid(folder, grid, settings, train_cell, _restore, processes=processes, report=report)
    kinds = summarize(results)
    write_results(folder, _document(results, kinds, settings), markdown_table(kinds), _plot(results))
    return kinds


def _restore(content: dict[str, Any], cell: Cell, settings: ProbeSettings) -> CellResult:
    curve = [(step, accuracy) for step, accuracy in content["curve"]]
    return CellResult(**{**content, "cell": cell, "settings": settings, "curve": curve})


def summarize(results: Sequence[CellResult]) -> list[KindResult]:
    """Mean and range of the held-out accuracy of each kind, in the order in which the kinds appear."""
    by_kind: dict[tuple[Attention, Positions], list[float]] = {}
    for result in results:
        by_kind.setdefault((result.cell.attention, result.cell.positions), []).append(result.accuracy)
    return [KindResult(*kind, sum(a) / len(a), min(a), max(a), len(a)) for kind, a in by_kind.items()]


def table_rows(kinds: Sequence[KindResult]) -> list[tuple[str, ...]]:
    """One row of text per kind under COLUMNS, and the line of chance."""
    rows = [
        (
            kind.attention.replace("_", "-"),
            kind.positions,
            f"{kind.mean:.1%}",
            f"{kind.lowest:.1%} to {kind.highest:.1%}",
            f"{kind.mean / CHANCE:.1f}",
            str(kind.seeds),
        )
        for kind in kinds
    ]
    return [*rows, ("chance", "", f"{CHANCE:.1%}", "", "1.0", "")]


def markdown_table(kinds: Sequence[KindResult]) -> str:
    """The table for a document."""
    return as_markdown(COLUMNS, table_rows(kinds))


def _document(results: Sequence[CellResult], kinds: Sequence[KindResult], settings: ProbeSettings) -> dict[str, Any]:
    return {
        "probe": "argmax",
        "chance": CHANCE,
        "settings": asdict(settings),
        "kinds": [asdict(kind) for kind in kinds],
        "cells": [asdict(result) for result in results],
    }


_LINES = {"none": "-", "rotary": "--", "learned": ":"}


def _plot(results: Sequence[CellResult]) -> Figure:
    """Accuracy over steps: a line per kind, the mean of its seeds, in a band from the lowest to the highest."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for kind in summarize(results):
        curves = [r.curve for r in results if (r.cell.attention, r.cell.positions) == (kind.attention, kind.positions)]
        steps = [step for step, _ in curves[0]]
        by_step = list(zip(*([accuracy for _, accuracy in curve] for curve in curves), strict=True))
        colour, name = COLOURS[kind.attention], kind.attention.replace("_", "-")
        axes.fill_between(steps, [min(a) for a in by_step], [max(a) for a in by_step], color=colour, alpha=0.12)
        axes.plot(
            steps,
            [sum(a) / len(a) for a in by_step],
            color=colour,
            linestyle=_LINES[kind.positions],
            label=f"{name}, positions: {kind.positions}",
        )
    axes.axhline(CHANCE, color="black", linewidth=0.8, linestyle=":", label="chance, 1/64")
    axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1), title="Where is the largest of 64 values?")
    axes.legend(fontsize=8)
    return figure
