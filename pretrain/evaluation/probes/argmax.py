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
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.config.model import ModelConfig
from pretrain.evaluation.context.plan import Progress
from pretrain.evaluation.probes.grid import by_kind, train_grid, write_results
from pretrain.evaluation.probes.training import ProbeSettings, reproducible, train_probe
from pretrain.evaluation.report.charts import Line, LineChart
from pretrain.evaluation.report.markdown import markdown_table
from pretrain.evaluation.report.pictures import chart_figure
from pretrain.evaluation.report.section import Table
from pretrain.model.encoder import Encoder
from pretrain.model.kernels import Kind
from pretrain.model.layout import AttentionLayout

Positions = Literal["rotary", "learned", "none"]

LENGTH = 64
"""Values in a sequence, and indices to choose from."""

VALUES = 64
"""Values there are: 0 to 63."""

CHANCE = 1 / LENGTH

_BEGIN, _END = VALUES, VALUES + 1
"""Symbols before and after the values; the answer is read at the latter."""


@dataclass(frozen=True, kw_only=True)
class ArgmaxSettings(ProbeSettings):
    """How each cell of the grid is trained and measured; the defaults take about half a minute of one core."""

    steps: int = 1000
    batch_size: int = 32
    hidden_size: int = 32
    num_layers: int = 2
    """One to know the positions, one to read that of the largest."""
    num_heads: int = 4
    learning_rate: float = 1e-2
    decay: float = 0.4
    held_out: int = 2048
    """Sequences that the final accuracy is measured on."""
    held_out_seed: int = 2**31
    """Added to a cell's seed for these. A torch generator keeps 32 bits of its seed: larger ones come round again."""


@dataclass(frozen=True)
class ArgmaxCell:
    """One training: a kind of encoder and a seed."""

    attention: Kind
    positions: Positions
    seed: int

    @property
    def kind(self) -> tuple[Kind, Positions]:
        """What does not depend on the seed."""
        return self.attention, self.positions

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.attention}-{self.positions}-{self.seed}"


@dataclass(frozen=True)
class ArgmaxResult:
    """What became of a cell."""

    cell: ArgmaxCell
    settings: ArgmaxSettings
    accuracy: float
    """Share of the held-out sequences answered rightly at the end."""
    loss: float
    """Nats per held-out sequence; log(64) = 4.159 is chance."""
    curve: list[tuple[int, float]]
    """(step, accuracy since the point before). Every batch is drawn anew, so this is accuracy on unseen sequences."""
    seconds: float


@dataclass(frozen=True)
class KindAccuracy:
    """Held-out accuracy of a kind of encoder, over its seeds."""

    attention: Kind
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
        begin, query = (torch.full((len(values), 1), symbol) for symbol in (_BEGIN, _END))
        hidden = self.encoder(torch.cat((begin, values, query), dim=1), layout)
        return self.read_out(hidden[:, -1])


def probe_layout(rows: int) -> AttentionLayout:
    """The layout of `rows` sequences, each with its two symbols."""
    documents = torch.ones(rows, LENGTH + 2, dtype=torch.int64)
    positions = torch.arange(LENGTH + 2).expand(rows, -1)
    return AttentionLayout.from_batch(Batch(documents, documents, documents, positions))


def train_argmax(cell: ArgmaxCell, settings: ArgmaxSettings) -> ArgmaxResult:
    """Train one encoder and measure it. Equal on equal machines, since everything random comes from the seed."""
    started = time.monotonic()
    model = ModelConfig(
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        attention=cell.attention,
        positions=cell.positions,
    )
    with reproducible(cell.seed):
        probe = PositionProbe(model)
        generator, layout = torch.Generator().manual_seed(cell.seed), probe_layout(settings.batch_size)

        def forward(_: int) -> tuple[Tensor, Tensor]:
            values, answer = draw_sequences(settings.batch_size, generator)
            scores = probe(values, layout)
            return F.cross_entropy(scores, answer), scores.argmax(dim=1) == answer

        curve = train_probe(probe, settings, forward)
        accuracy, loss = _measure(probe, cell.seed, settings)
    return ArgmaxResult(cell, settings, accuracy, loss, curve, round(time.monotonic() - started, 1))


@torch.inference_mode()
def _measure(probe: PositionProbe, seed: int, settings: ArgmaxSettings) -> tuple[float, float]:
    """Return accuracy and loss on held-out sequences."""
    values, answer = draw_sequences(settings.held_out, torch.Generator().manual_seed(seed + settings.held_out_seed))
    scores = torch.cat([probe(part, probe_layout(len(part))) for part in values.split(256)])
    return float((scores.argmax(dim=1) == answer).double().mean()), float(F.cross_entropy(scores, answer))


# ------------------------------------------------------------------------------------------------- the whole grid


def run_argmax(
    folder: Path,
    attentions: Sequence[Kind],
    positions: Sequence[Positions],
    seeds: Sequence[int],
    settings: ArgmaxSettings,
    *,
    processes: int = 1,
    report: Progress = lambda *_: None,
) -> list[KindAccuracy]:
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
    grid = [ArgmaxCell(a, p, seed) for a in attentions for p in positions for seed in seeds]
    results = train_grid(folder, grid, settings, train_argmax, _restore, processes=processes, report=report)
    kinds = kind_accuracies(results)
    document = {
        "probe": "argmax",
        "chance": CHANCE,
        "settings": asdict(settings),
        "kinds": [asdict(kind) for kind in kinds],
        "cells": [asdict(result) for result in results],
    }
    figure = chart_figure(_chart(results), "Where is the largest of 64 values?", (7.2, 4.2))
    write_results(folder, document, markdown_table(accuracy_table(kinds)), figure)
    return kinds


def _restore(content: dict[str, Any], cell: ArgmaxCell, settings: ArgmaxSettings) -> ArgmaxResult:
    curve = [(step, accuracy) for step, accuracy in content["curve"]]
    return ArgmaxResult(**{**content, "cell": cell, "settings": settings, "curve": curve})


def kind_accuracies(results: Sequence[ArgmaxResult]) -> list[KindAccuracy]:
    """Return mean and range of the held-out accuracy of each kind, in the order in which the kinds appear."""
    by_seed = {kind: [result.accuracy for result in of_kind] for kind, of_kind in by_kind(results).items()}
    return [KindAccuracy(*kind, sum(a) / len(a), min(a), max(a), len(a)) for kind, a in by_seed.items()]


def accuracy_table(kinds: Sequence[KindAccuracy]) -> Table:
    """Return a row for each kind, and one for chance."""
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
    header = ("attention", "positions", "accuracy", "lowest to highest", "times chance", "seeds")
    return Table(header, [*rows, ("chance", "", f"{CHANCE:.1%}", "", "1.0", "")])


def _chart(results: Sequence[ArgmaxResult]) -> LineChart:
    """Return accuracy over steps: the mean of each kind's seeds, in a band from the lowest to the highest."""
    lines = []
    for (attention, positions), of_kind in by_kind(results).items():
        points, band = [], []
        for at_step in zip(*(result.curve for result in of_kind), strict=True):
            seeds = [accuracy for _, accuracy in at_step]
            points.append((at_step[0][0], sum(seeds) / len(seeds)))
            band.append((min(seeds), max(seeds)))
        name = f"{attention.replace('_', '-')}, positions: {positions}"
        lines.append(Line(name, points, band, dashed=positions != "none", plain=True))
    steps = results[0].settings.steps
    lines.append(Line("chance, 1/64", [(0, CHANCE), (steps, CHANCE)], muted=True))
    return LineChart(lines, "step", "accuracy", x_ticks=[steps * k / 4 for k in range(5)], zero=True)
