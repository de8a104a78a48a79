"""Loss and gain by context length, by place in the window, and under interventions."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from pretrain.data.arrays import Flags, Floats
from pretrain.evaluation.context.interventions import FACTORED
from pretrain.evaluation.context.results.evaluation import Evaluation, Scores
from pretrain.evaluation.context.results.statistics import DocumentBootstrap, MeanEstimate, doubling_bins, even_bins
from pretrain.evaluation.report.schema import Bin, ContextNeed, InterventionResult, LengthResult, LossProfile
from pretrain.evaluation.report.titles import Intervention

Quantity = Literal["position", "edge_distance", "document_length"]

_POSITION_BINS = 8

MIN_BIN_TARGETS = 20
"""Bins of fewer targets are left out."""


def length_results(evaluation: Evaluation) -> list[LengthResult]:
    """Return the curve, ascending."""
    results: list[LengthResult] = []
    before: Scores | None = None
    needing = needing_targets(evaluation)
    for multiple in evaluation.multiples:
        results.append(_length_result(evaluation, multiple, before, needing))
        before = evaluation.plain(multiple)
    return results


def _length_result(
    evaluation: Evaluation, multiple: float, before: Scores | None, needing: Flags | None
) -> LengthResult:
    """Compare with the training length, and with `before`, the scores at the length before."""
    mean, threshold = evaluation.bootstrap.mean, evaluation.plan.context_threshold
    scores = evaluation.plain(multiple)
    gains = evaluation.plain(1.0).losses - scores.losses
    loss, gain, accuracy = mean(scores.losses), mean(gains), mean(scores.correct)
    step = None if before is None else mean(before.losses - scores.losses)
    need = None if needing is None else mean(gains, needing)
    return LengthResult(
        multiple=multiple,
        length=evaluation.plan.length(multiple),
        loss=loss.value,
        loss_interval=loss.interval,
        perplexity=math.exp(loss.value),
        masked_accuracy=accuracy.value,
        accuracy_interval=accuracy.interval,
        gain=gain.value,
        gain_interval=gain.interval,
        step_gain=step.value if step else None,
        step_gain_interval=step.interval if step else None,
        helped=float((gains > threshold).mean()),
        hurt=float((gains < -threshold).mean()),
        needing_loss=None if needing is None else mean(scores.losses, needing).value,
        needing_gain=need.value if need else None,
        needing_gain_interval=need.interval if need else None,
    )


def needing_targets(evaluation: Evaluation) -> Flags | None:
    """bool [targets]: whether the loss falls by more than the threshold from the shortest length to 1x.

    None if 1x is the shortest, or if no target's loss does.
    """
    shortest = evaluation.multiples[0]
    if shortest >= 1:
        return None
    falls = evaluation.plain(shortest).losses - evaluation.plain(1.0).losses > evaluation.plan.context_threshold
    return falls if falls.any() else None


def context_need(evaluation: Evaluation) -> ContextNeed | None:
    """Return how the targets that need context were chosen."""
    needing, plan = needing_targets(evaluation), evaluation.plan
    if needing is None:
        return None
    short = plan.length(evaluation.multiples[0])
    return ContextNeed(threshold=plan.context_threshold, short_length=short, targets=int(needing.sum()))


def profiles(evaluation: Evaluation, min_targets: int = MIN_BIN_TARGETS) -> list[LossProfile]:
    """Return losses by position, by distance to the edge and by document length; bins have at least `min_targets`."""
    found = []
    lengths = np.array([w.document_length for w in evaluation.session.windows])[evaluation.window_of_target]
    document_bins = doubling_bins(evaluation.plan.training_length, lengths.max())
    for multiple in evaluation.multiples:
        length = evaluation.plan.length(multiple)
        columns = evaluation.rows(multiple).positions
        edge = np.minimum(columns, length - 1 - columns)
        quantities: list[tuple[Quantity, Floats, list[tuple[float, float]]]] = [
            ("position", columns / length, even_bins(_POSITION_BINS)),
            ("edge_distance", edge.astype(np.float64), doubling_bins(8, int(edge.max()))),
            ("document_length", lengths.astype(np.float64), document_bins),
        ]
        for by, values, bounds in quantities:
            bins = _bins(evaluation, multiple, values, bounds, min_targets)
            found.append(LossProfile(multiple=multiple, by=by, bins=bins))
    return found


def _bins(
    evaluation: Evaluation,
    multiple: float,
    quantity: Floats,
    bounds: Sequence[tuple[float, float]],
    min_targets: int,
) -> list[Bin]:
    losses, bins = evaluation.plain(multiple).losses, []
    gains = evaluation.plain(1.0).losses - losses
    for low, high in bounds:
        inside = (quantity >= low) & (quantity < high)
        if (count := int(inside.sum())) >= min_targets:
            loss, gain = evaluation.bootstrap.mean(losses, inside), float(gains[inside].mean())
            bins.append(Bin(low=low, high=high, targets=count, loss=loss.value, loss_interval=loss.interval, gain=gain))
    return bins


# ---------------------------------------------------------------------------------------------------- interventions


def intervention_results(evaluation: Evaluation) -> list[InterventionResult]:
    """Return each intervention at every longer length that fits, beside the plain encoder on the same windows.

    What does not fit is told in `evaluation.skipped`.
    """
    results = []
    names: list[Intervention] = ["plain", *evaluation.plan.interventions]
    for name in names:
        for multiple in [m for m in evaluation.multiples if m > 1]:
            factor = multiple if name in FACTORED else 1.0
            long, short = evaluation.scores(name, multiple, factor), evaluation.scores(name, 1.0, factor)
            if long is None or short is None:
                evaluation.skipped.setdefault(name, "its rows do not fit into memory")
                continue
            results.append(_on_first_windows(evaluation, name, multiple, factor, long, short))
    return results


def ablation_results(evaluation: Evaluation) -> list[InterventionResult]:
    """Return each triangle switched off, at the training length and at the longest."""
    results = []
    for name in evaluation.plan.ablations:
        short = evaluation.scores(name, 1.0)
        for multiple in dict.fromkeys([1.0, evaluation.multiples[-1]]):
            long = evaluation.scores(name, multiple)
            if long is not None and short is not None:
                results.append(_on_first_windows(evaluation, name, multiple, 1.0, long, short))
    return results


def _on_first_windows(
    evaluation: Evaluation, name: Intervention, multiple: float, factor: float, long: Scores, short: Scores
) -> InterventionResult:
    """`long` and `short` are scores under the intervention; those on all windows (the plain ones) are cut."""
    chosen = evaluation.first_targets(evaluation.plan.reading_windows)
    control = evaluation.plain(1.0).losses[chosen]
    bootstrap = DocumentBootstrap(evaluation.documents[chosen], evaluation.plan.seed)
    at_training = bootstrap.mean(short.losses[: len(control)] - control)
    return _intervention_result(name, multiple, factor, long.losses[: len(control)], control, at_training, bootstrap)


def recalibrated_results(before: Evaluation, after: Evaluation) -> list[InterventionResult]:
    """Return gains over the crop of the encoder as it was, and what the recalibration costs at 1x."""
    control = before.plain(1.0).losses
    bootstrap = DocumentBootstrap(before.documents, before.plan.seed)
    at_training = bootstrap.mean(after.plain(1.0).losses - control)
    return [
        _intervention_result("recalibrated", m, 1.0, after.plain(m).losses, control, at_training, bootstrap)
        for m in after.multiples
    ]


def _intervention_result(
    name: str,
    multiple: float,
    factor: float,
    losses: Floats,
    control: Floats,
    regression: MeanEstimate,
    bootstrap: DocumentBootstrap,
) -> InterventionResult:
    """Compare losses with those of the plain encoder at the training length, `control`, on the same targets."""
    loss, gain = bootstrap.mean(losses), bootstrap.mean(control - losses)
    return InterventionResult(
        reading=name,
        multiple=multiple,
        factor=factor,
        loss=loss.value,
        loss_interval=loss.interval,
        gain=gain.value,
        gain_interval=gain.interval,
        regression=regression.value,
        regression_interval=regression.interval,
    )
