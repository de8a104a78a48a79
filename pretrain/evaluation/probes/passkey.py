"""The passkey probe: can a kind of encoder learn to find a key, and does it find it in rows longer than it learned on?

A small encoder of each kind is trained from scratch, on the CPU, on rows up to the training length, and measured on
the rows of tasks.py: random tokens with a marker and its key somewhere, and elsewhere the marker with the key masked.
Several pairs stand in a row of the training, so that only the marker tells the right key; one pair in a row that
is measured.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import IGNORED, Batch
from pretrain.config.model import LayerConfig, ModelConfig
from pretrain.data.tokenizer import BOS, EOS, MASK, SPECIAL_PIECES
from pretrain.evaluation.context.interventions import intervene
from pretrain.evaluation.context.tasks import KEY, SPAN, TaskRows, Vocabulary, draw_rows
from pretrain.evaluation.probes.training import ProbeSettings, reproducible, train_probe
from pretrain.evaluation.report.titles import Intervention
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.kernels import Kind
from pretrain.model.layout import AttentionLayout

Pattern = Literal["local_global", "rotary", "none"]
"""A local rotary layer and a global one without positions; rotary positions in every layer; no positions at all."""

COMPARED: tuple[Intervention, ...] = ("plain", "log_length")

_SPECIAL = len(SPECIAL_PIECES)

_MEASURED = 2**32
"""Added to a cell's seed for the rows that are measured."""

_ROWS_AT_ONCE = 32_768
"""Tokens that are measured in one forward pass."""


@dataclass(frozen=True, kw_only=True)
class PasskeySettings(ProbeSettings):
    """How each cell of the grid is trained and measured; the defaults take about two minutes of one core."""

    steps: int = 1800
    row_lengths: tuple[int, ...] = (32, 48, 64, 96, 128)
    """Lengths of the rows trained on, in tokens, the shortest first; the last is the training length, 1x."""
    curriculum: float = 0.5
    """Share of the steps, at the beginning, during which the longer rows come in, one length after another."""
    tokens: int = 2048
    """Tokens of a batch, whose rows are of one length."""
    pieces: int = 64
    """Pieces that rows are made of; 10 of them make up keys."""
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 2
    span: int = 16
    """Span of a local layer, in positions of either triangle, itself included."""
    local_theta: float = 30.0
    """Base of the rotary frequencies of a local layer: its slowest pair turns about once in its reach."""
    learning_rate: float = 5e-3
    decay: float = 0.3
    factors: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Lengths to measure at, in training lengths."""
    samples: int = 2
    """Measured rows of each length, distance, depth and side."""

    @property
    def training_length(self) -> int:
        """1x, in tokens."""
        return self.row_lengths[-1]

    @property
    def vocab_size(self) -> int:
        """Pieces, and the special ones before them."""
        return _SPECIAL + self.pieces


@dataclass(frozen=True)
class PasskeyCell:
    """One training: a kind of encoder and a seed."""

    attention: Kind
    pattern: Pattern
    seed: int

    @property
    def kind(self) -> tuple[Kind, Pattern]:
        """What does not depend on the seed."""
        return self.attention, self.pattern

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"{self.attention}-{self.pattern}-{self.seed}"


@dataclass(frozen=True)
class Found:
    """How many keys a cell found at one length and distance, under one intervention."""

    reading: Intervention
    factor: int
    """Length of the rows in training lengths."""
    distance: int
    """Tokens from the key's marker to the question's."""
    rows: int
    keys: int
    """Rows in which each of the four tokens was right; the answer is the most likely id of the whole vocabulary."""
    tokens: int
    """Right tokens of the 4 x rows, by the same answers."""
    tokens_among_candidates: int
    """Right tokens where the most likely of the ten candidates is the answer."""


@dataclass(frozen=True)
class PasskeyResult:
    """What became of a cell."""

    cell: PasskeyCell
    settings: PasskeySettings
    found: list[Found]
    curve: list[tuple[int, float]]
    """(step, share of right tokens since the point before). Every batch is drawn anew."""
    seconds: float


def passkey_vocabulary(settings: PasskeySettings) -> Vocabulary:
    """Pieces that are equally frequent, and the candidates among them: the same for every cell."""
    is_special = np.arange(settings.vocab_size) < _SPECIAL
    return Vocabulary.from_counts((~is_special).astype(np.int64), is_special, seed=0)


def model_config(attention: Kind, pattern: Pattern, settings: PasskeySettings) -> ModelConfig:
    """The encoder of a kind; the patterns differ in no weight."""
    local = LayerConfig(span=settings.span, positions="rotary", rotary_theta=settings.local_theta)
    layers = [local, LayerConfig(span="global", positions="none")] if pattern == "local_global" else []
    return ModelConfig(
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        attention=attention,
        positions="none" if pattern == "none" else "rotary",
        layers=layers,
    )


# ------------------------------------------------------------------------------------------------- rows to train on


def draw_training_rows(rows: int, length: int, keys: Vocabulary, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw rows that are full of pairs of a marker and a key, each in two places, of which one has its key masked.

    For every ten tokens there is half a pair, eight tokens. Where the halves lie, which belong together and which of
    two is the question, is drawn evenly, so that every distance occurs on either side.

    Returns:
        Ids and targets, IGNORED where nothing is asked; int64 [rows, length].
    """
    pairs = (length - 2) // (SPAN + 2) // 2
    free = length - 2 - 2 * pairs * SPAN
    pieces, candidates = torch.from_numpy(keys.pieces), torch.from_numpy(keys.candidates)

    def draw(among: Tensor, *shape: int) -> Tensor:
        return among[torch.randint(len(among), shape, generator=generator)]

    inputs = draw(pieces, rows, length)
    inputs[:, 0], inputs[:, -1] = BOS, EOS
    before = torch.randint(free + 1, (rows, 2 * pairs), generator=generator).sort(dim=1).values
    order = torch.rand(rows, 2 * pairs, generator=generator).argsort(dim=1)
    starts = (1 + before + torch.arange(2 * pairs) * SPAN).gather(1, order)
    places = starts[:, :, None] + torch.arange(SPAN)
    answers, questions = places[:, :pairs].flatten(1), places[:, pairs:].flatten(1)
    pair = torch.cat((draw(pieces, rows, pairs, SPAN - KEY), draw(candidates, rows, pairs, KEY)), dim=2).flatten(1)
    masked = torch.arange(SPAN).repeat(pairs) >= SPAN - KEY
    inputs.scatter_(1, answers, pair).scatter_(1, questions, torch.where(masked, MASK, pair))
    targets = torch.full_like(inputs, IGNORED).scatter_(1, questions, torch.where(masked, pair, IGNORED))
    return inputs, targets


def row_length(step: int, settings: PasskeySettings, generator: torch.Generator) -> int:
    """Length of the rows of a step, from 1: drawn among those that have come in by then."""
    lengths, ramp = settings.row_lengths, settings.curriculum * settings.steps
    there = len(lengths) if step >= ramp else 1 + int(len(lengths) * step / ramp)
    return lengths[int(torch.randint(min(there, len(lengths)), (1,), generator=generator))]


def _batch(inputs: Tensor, targets: Tensor) -> Batch:
    """Every row is one document."""
    return Batch(inputs, targets, torch.ones_like(inputs), torch.arange(inputs.shape[1]).expand_as(inputs))


# ------------------------------------------------------------------------------------------- training and measuring


def train_passkey(cell: PasskeyCell, settings: PasskeySettings) -> PasskeyResult:
    """Train one encoder and measure it. Equal on equal machines, since everything random comes from the seed."""
    started = time.monotonic()
    with reproducible(cell.seed):
        model = MaskedLanguageModel(model_config(cell.attention, cell.pattern, settings), settings.vocab_size)
        generator, keys = torch.Generator().manual_seed(cell.seed), passkey_vocabulary(settings)
        layouts: dict[int, AttentionLayout] = {}

        def forward(step: int) -> tuple[Tensor, Tensor]:
            length = row_length(step, settings, generator)
            batch = _batch(*draw_training_rows(max(1, settings.tokens // length), length, keys, generator))
            if length not in layouts:
                layouts[length] = AttentionLayout.from_batch(batch)
            losses, correct = model(batch, layouts[length])
            return losses.mean(), correct

        curve = train_probe(model.train(), settings, forward)
        found = list(measure(model, cell.seed, settings))
    return PasskeyResult(cell, settings, found, curve, round(time.monotonic() - started, 1))


def measure(model: MaskedLanguageModel, seed: int, settings: PasskeySettings) -> Iterator[Found]:
    """Yield what was found by intervention, length and distance; `plain` alone at the training length."""
    keys, trained = passkey_vocabulary(settings), settings.training_length
    model.eval()
    for factor in settings.factors:
        length = factor * trained
        rows = draw_rows("passkey", length, trained, settings.samples, keys, seed + _MEASURED)
        for intervention in COMPARED:
            if intervention == "plain" or factor > 1:
                with torch.inference_mode(), intervene(model.encoder, intervention, length, trained):
                    right, among = _answers(model, rows, torch.from_numpy(keys.candidates))
            for distance in np.unique(rows.distances).tolist():
                here = torch.from_numpy(rows.distances == distance)
                whole = int(right[here].all(dim=1).sum())
                num = int(here.sum())
                yield Found(intervention, factor, distance, num, whole, int(right[here].sum()), int(among[here].sum()))


def _answers(model: MaskedLanguageModel, rows: TaskRows, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Is each token right, bool [rows, KEY]: as the most likely id of all, and as the most likely candidate?"""
    right, among = [], []
    inputs, targets = torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets)
    at_once = max(1, _ROWS_AT_ONCE // inputs.shape[1])
    for some, wanted in zip(inputs.split(at_once), targets.split(at_once), strict=True):
        batch = _batch(some, wanted)
        hidden = model.encoder(some, AttentionLayout.from_batch(batch))
        asked = wanted != IGNORED
        scores = model.head(hidden[asked] * model.output_scale)
        right.append((scores.argmax(dim=-1) == wanted[asked]).view(-1, KEY))
        among.append((candidates[scores[:, candidates].argmax(dim=-1)] == wanted[asked]).view(-1, KEY))
    return torch.cat(right), torch.cat(among)


def restore_passkey(content: dict[str, Any], cell: PasskeyCell, settings: PasskeySettings) -> PasskeyResult:
    """Return a result from what its file holds."""
    curve = [(step, accuracy) for step, accuracy in content["curve"]]
    found = [Found(**one) for one in content["found"]]
    return PasskeyResult(**{**content, "cell": cell, "settings": settings, "curve": curve, "found": found})
