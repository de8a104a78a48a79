"""Context extension: does the encoder read further than it was trained, and does it use what it reads?

The same masked tokens are predicted from longer and longer windows (windows.py), so a difference between two lengths
is due to the context and nothing else, and the window of the training length is the crop control of all longer ones.
This file turns the parts that ranks have computed (work.py) into a `ContextReport`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.errors import UserError
from pretrain.evaluation.context.attention_statistics import FIELDS
from pretrain.evaluation.context.interventions import FACTORED
from pretrain.evaluation.context.plan import Part
from pretrain.evaluation.context.session import Session
from pretrain.evaluation.context.statistics import Bools, DocumentBootstrap, Floats, doubling_bins, even_bins, wilson
from pretrain.evaluation.context.tasks import DEPTHS, SIDES, draw_rows
from pretrain.evaluation.context.windows import Rows, make_rows, middle_targets
from pretrain.evaluation.context.work import Arrays, load_part
from pretrain.evaluation.report.schema import (
    AttentionResult,
    Bin,
    ContextNeed,
    InterventionResult,
    LengthResult,
    LossProfile,
    PseudoResult,
    SpeedResult,
    TaskCell,
    TaskResult,
)
from pretrain.evaluation.report.titles import Intervention
from pretrain.model.kernels import TRIANGLES

HELD_WITHIN = 0.01
"""A loss is held if it is no more than this share above that at the training length."""


Quantity = Literal["position", "edge_distance", "document_length"]


_POSITION_BINS = 8


_MIN_BIN = 20
"""Bins of fewer targets are left out."""


@dataclass(frozen=True)
class Scores:
    """Of every target of some windows, in the order of the windows."""

    losses: Floats
    correct: Bools


class Evaluation:
    """The parts of a finished plan, put together."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.plan, self._folder = session, session.plan, folder
        self._parts: dict[tuple[object, ...], list[Part]] = {}
        for part in self.plan.parts():
            self._parts.setdefault((part.kind, part.task, part.reading, part.multiple, part.factor), []).append(part)
        self._loaded: dict[str, Arrays] = {}
        self.skipped = dict(self.plan.skipped)
        self.multiples: list[float] = []
        for multiple in self.plan.multiples:
            if why := self._why_skipped(multiple):
                self.skipped[f"{multiple:g}x"] = why
            else:
                self.multiples.append(multiple)
        if 1.0 not in self.multiples:
            raise UserError(f"not even the training length can be measured: {self.skipped['1x']}")

    def _why_skipped(self, multiple: float) -> str | None:
        parts = self._parts["scores", None, "plain", multiple, 1.0]
        return next((str(a["skipped"]) for part in parts if "skipped" in (a := self._arrays(part))), None)

    def _arrays(self, part: Part) -> Arrays:
        if part.name not in self._loaded:
            self._loaded[part.name] = load_part(self._folder, self.plan, part)
        return self._loaded[part.name]

    def scores(self, reading: Intervention, multiple: float, factor: float = 1.0) -> Scores | None:
        """Of all windows of a reading; None where they did not fit or were not planned."""
        key = ("scores", None, reading, multiple, factor if reading in FACTORED else 1.0)
        arrays = [self._arrays(part) for part in self._parts.get(key, [])]
        if not arrays or any("skipped" in a for a in arrays):
            return None
        losses = np.concatenate([a["losses"] for a in arrays]).astype(np.float64)
        return Scores(losses, np.concatenate([a["correct"] for a in arrays]))

    def plain(self, multiple: float) -> Scores:
        """Of the encoder as trained, at one of `multiples`."""
        scores = self.scores("plain", multiple)
        assert scores is not None
        return scores

    # ------------------------------------------------------------------------------------------ what a target is

    def rows(self, multiple: float) -> Rows:
        """The rows of all windows at a length."""
        plan, session = self.plan, self.session
        return make_rows(session.windows, plan.length(multiple), plan.training_length, session.rule, plan.seed)

    @cached_property
    def targets(self) -> npt.NDArray[np.int64]:
        """Ids to be predicted."""
        targets = self.rows(1.0).targets
        return targets[targets >= 0]

    @cached_property
    def window_of_target(self) -> npt.NDArray[np.int64]:
        """Number of the window of every target."""
        return np.nonzero(self.rows(1.0).targets >= 0)[0]

    @cached_property
    def documents(self) -> npt.NDArray[np.int64]:
        """Document of every target."""
        return np.array([window.document for window in self.session.windows])[self.window_of_target]

    @cached_property
    def bootstrap(self) -> DocumentBootstrap:
        """Over all targets."""
        return DocumentBootstrap(self.documents, self.plan.seed)

    def first_targets(self, windows: int) -> Bools:
        """bool [targets]: those of the first windows."""
        return self.window_of_target < windows

    # ------------------------------------------------------------------------------------------ curves

    def length_results(self) -> list[LengthResult]:
        """The curve, ascending."""
        control, results = self.plain(1.0), []
        before: Scores | None = None
        needing = self.needing
        for multiple in self.multiples:
            scores = self.plain(multiple)
            gains = control.losses - scores.losses
            loss, gain = self.bootstrap.mean(scores.losses), self.bootstrap.mean(gains)
            accuracy = self.bootstrap.mean(scores.correct)
            step = None if before is None else self.bootstrap.mean(before.losses - scores.losses)
            need = None if needing is None else self.bootstrap.mean(gains, needing)
            results.append(
                LengthResult(
                    multiple=multiple,
                    length=self.plan.length(multiple),
                    loss=loss.value,
                    loss_interval=loss.interval,
                    perplexity=math.exp(loss.value),
                    masked_accuracy=accuracy.value,
                    accuracy_interval=accuracy.interval,
                    gain=gain.value,
                    gain_interval=gain.interval,
                    step_gain=step.value if step else None,
                    step_gain_interval=step.interval if step else None,
                    helped=float((gains > self.plan.context_threshold).mean()),
                    hurt=float((gains < -self.plan.context_threshold).mean()),
                    needing_loss=None if needing is None else self.bootstrap.mean(scores.losses, needing).value,
                    needing_gain=need.value if need else None,
                    needing_gain_interval=need.interval if need else None,
                )
            )
            before = scores
        return results

    @cached_property
    def needing(self) -> Bools | None:
        """Targets whose loss falls by more than the threshold from the shortest length to 1x; None if 1x is it."""
        shortest = self.multiples[0]
        if shortest >= 1:
            return None
        falls = self.plain(shortest).losses - self.plain(1.0).losses > self.plan.context_threshold
        return falls if falls.any() else None

    def context_need(self) -> ContextNeed | None:
        """How they were chosen."""
        if self.needing is None:
            return None
        short = self.plan.length(self.multiples[0])
        threshold = self.plan.context_threshold
        return ContextNeed(threshold=threshold, short_length=short, targets=int(self.needing.sum()))

    def profiles(self) -> list[LossProfile]:
        """Losses by position, by distance to the edge and by document length."""
        profiles = []
        lengths = np.array([w.document_length for w in self.session.windows])[self.window_of_target]
        for multiple in self.multiples:
            length = self.plan.length(multiple)
            columns = self.rows(multiple).positions
            edge = np.minimum(columns, length - 1 - columns)
            quantities: list[tuple[Quantity, Floats, list[tuple[float, float]]]] = [
                ("position", columns / length, even_bins(_POSITION_BINS)),
                ("edge_distance", edge.astype(np.float64), doubling_bins(8, int(edge.max()))),
                (
                    "document_length",
                    lengths.astype(np.float64),
                    doubling_bins(self.plan.training_length, lengths.max()),
                ),
            ]
            profiles += [
                LossProfile(multiple=multiple, by=by, bins=self._bins(multiple, q, b)) for by, q, b in quantities
            ]
        return profiles

    def _bins(self, multiple: float, quantity: Floats, bounds: Sequence[tuple[float, float]]) -> list[Bin]:
        scores, control, bins = self.plain(multiple), self.plain(1.0), []
        for low, high in bounds:
            inside = (quantity >= low) & (quantity < high)
            if inside.sum() < _MIN_BIN:
                continue
            loss = self.bootstrap.mean(scores.losses, inside)
            gain = float((control.losses - scores.losses)[inside].mean())
            count = int(inside.sum())
            bins.append(Bin(low=low, high=high, targets=count, loss=loss.value, loss_interval=loss.interval, gain=gain))
        return bins

    # ------------------------------------------------------------------------------------------ readings

    def reading_results(self, readings: Sequence[Intervention]) -> list[InterventionResult]:
        """Each reading at every longer length that fits, beside the plain encoder on the same windows."""
        results = []
        for reading in ("plain", *readings):
            for multiple in [m for m in self.multiples if m > 1]:
                factor = multiple if reading in FACTORED else 1.0
                long, short = self.scores(reading, multiple, factor), self.scores(reading, 1.0, factor)
                if long is None or short is None:
                    self.skipped.setdefault(reading, "its rows do not fit into memory")
                    continue
                results.append(self._reading_result(reading, multiple, factor, long, short))
        return results

    def ablation_results(self) -> list[InterventionResult]:
        """Each triangle switched off, at the training length and at the longest."""
        results = []
        for reading in self.plan.ablations:
            short = self.scores(reading, 1.0)
            for multiple in dict.fromkeys([1.0, self.multiples[-1]]):
                long = self.scores(reading, multiple)
                if long is not None and short is not None:
                    results.append(self._reading_result(reading, multiple, 1.0, long, short))
        return results

    def _reading_result(
        self, reading: Intervention, multiple: float, factor: float, long: Scores, short: Scores
    ) -> InterventionResult:
        chosen = self.first_targets(self.plan.reading_windows)
        control = self.plain(1.0).losses[chosen]
        bootstrap = DocumentBootstrap(self.documents[chosen], self.plan.seed)
        # A reading that was measured on all windows (the plain one) is cut to these.
        losses, at_training = long.losses[: len(control)], short.losses[: len(control)]
        loss, gain = bootstrap.mean(losses), bootstrap.mean(control - losses)
        regression = bootstrap.mean(at_training - control)
        return InterventionResult(
            reading=reading,
            multiple=multiple,
            factor=factor,
            loss=loss.value,
            loss_interval=loss.interval,
            gain=gain.value,
            gain_interval=gain.interval,
            regression=regression.value,
            regression_interval=regression.interval,
        )

    # ------------------------------------------------------------------------------------------ probes

    def task_results(self) -> list[TaskResult]:
        """Every task at every length that fits."""
        return [
            self._task_result(part, a) for part in self._of_kind("task") if "skipped" not in (a := self._arrays(part))
        ]

    def _of_kind(self, kind: str) -> list[Part]:
        return [part for part in self.plan.parts() if part.kind == kind and part.multiple in self.multiples]

    def _task_result(self, part: Part, arrays: Arrays) -> TaskResult:
        plan, vocabulary = self.plan, self.session.vocabulary
        assert part.task is not None
        length, correct = plan.length(part.multiple), arrays["correct"]
        drawn = draw_rows(part.task, length, plan.training_length, plan.task_samples, vocabulary, plan.seed)
        cells = []
        for distance in np.unique(drawn.distances).tolist():
            for depth in DEPTHS:
                for number, side in enumerate(SIDES):
                    here = correct[(drawn.distances == distance) & (drawn.depths == depth) & (drawn.sides == number)]
                    accuracy, answers = float(here.mean()), int(here.size)
                    cells.append(
                        TaskCell(distance=distance, depth=depth, side=side, accuracy=accuracy, answers=answers)
                    )
        return TaskResult(
            task=part.task,
            reading=part.reading,
            multiple=part.multiple,
            length=length,
            chance=vocabulary.chance,
            accuracy=float(correct.mean()),
            accuracy_interval=wilson(int(correct.sum()), int(correct.size)),
            answers=int(correct.size),
            cells=cells,
        )

    def attention_results(self) -> list[AttentionResult]:
        """Every triangle of every layer at every length that fits."""
        results = []
        kind, layers = self.session.config.model.attention, self.session.config.model.resolved_layers
        for part in self._of_kind("attention"):
            arrays = self._arrays(part)
            if "skipped" in arrays:
                continue
            for layer, triangles in enumerate(arrays["statistics"], start=1):
                for side, values in zip(TRIANGLES[kind], triangles.tolist(), strict=True):
                    results.append(
                        AttentionResult(
                            multiple=part.multiple,
                            layer=layer,
                            triangle=side,
                            window=layers[layer - 1].window,
                            **dict(zip(FIELDS, values, strict=False)),
                            by_distance=values[len(FIELDS) :],
                        )
                    )
        return results

    def pseudo_results(self) -> list[PseudoResult]:
        """One mask at a time against many."""
        results = []
        for part in self._of_kind("pseudo"):
            arrays = self._arrays(part)
            if "skipped" in arrays:
                continue
            rows = self.rows(part.multiple)
            is_middle = middle_targets(rows)[rows.targets >= 0] & self.first_targets(part.last)
            masked, single = self.plain(part.multiple).losses[is_middle], arrays["losses"].astype(np.float64)
            bootstrap = DocumentBootstrap(self.documents[is_middle], self.plan.seed)
            estimate = bootstrap.mean(single)
            varied = len(single) > 2 and masked.std() > 0 and single.std() > 0
            results.append(
                PseudoResult(
                    multiple=part.multiple,
                    targets=len(single),
                    masked_loss=float(masked.mean()),
                    single_loss=estimate.value,
                    single_interval=estimate.interval,
                    correlation=float(np.corrcoef(masked, single)[0, 1]) if varied else 0.0,
                )
            )
        return results

    def speed_results(self) -> list[SpeedResult]:
        """Of the plain scores; on several ranks, of one of them while the others work too."""
        results = []
        for multiple in self.multiples:
            arrays = [self._arrays(part) for part in self._parts["scores", None, "plain", multiple, 1.0]]
            seconds, positions = (sum(float(a[key]) for a in arrays) for key in ("seconds", "positions"))
            peak = max(int(a["peak_bytes"]) for a in arrays)
            results.append(
                SpeedResult(
                    multiple=multiple,
                    length=self.plan.length(multiple),
                    tokens_per_s=positions / seconds,
                    peak_memory_bytes=None if peak < 0 else peak,
                )
            )
        return results


def held_multiple(results: Sequence[LengthResult]) -> float:
    """The longest length up to which the loss is held; see `is_held`."""
    return _last_of_run([r for r in results if r.multiple >= 1], is_held)


def effective_multiple(results: Sequence[LengthResult]) -> float:
    """The longest length up to which, on the way as well, the loss is held and the gain is surely above zero."""
    return _last_of_run([r for r in results if r.multiple >= 1], lambda r: is_held(r) and r.gain_interval[0] > 0)


def used_multiple(results: Sequence[LengthResult]) -> float:
    """The longest length up to which each is surely better than the one before it."""
    return _last_of_run(
        [r for r in results if r.multiple >= 1],
        lambda r: r.step_gain_interval is not None and r.step_gain_interval[0] > 0,
    )


def is_held(result: LengthResult) -> bool:
    """No worse than at the training length: within 1 %, or within the interval of the difference."""
    base = result.loss + result.gain
    return result.loss <= (1 + HELD_WITHIN) * base or result.gain_interval[1] >= 0


def _last_of_run(results: Sequence[LengthResult], good: Callable[[LengthResult], bool]) -> float:
    """The multiple of the last of the results after the first that are all good; of the first if the second is not."""
    last = results[0].multiple
    for result in results[1:]:
        if not good(result):
            break
        last = result.multiple
    return last
