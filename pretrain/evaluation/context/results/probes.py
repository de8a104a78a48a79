"""Tasks, attention, single masks and speed, from the arrays of their parts."""

import numpy as np

from pretrain.data.arrays import Flags
from pretrain.evaluation.context.attention_statistics import FIELDS
from pretrain.evaluation.context.plan import Part
from pretrain.evaluation.context.results.evaluation import Evaluation
from pretrain.evaluation.context.results.statistics import DocumentBootstrap, wilson
from pretrain.evaluation.context.tasks import DEPTHS, SIDES, draw_rows
from pretrain.evaluation.context.windows import middle_targets
from pretrain.evaluation.report.schema import AttentionResult, PseudoResult, SpeedResult, TaskCell, TaskResult
from pretrain.model.kernels import TRIANGLES


def task_results(evaluation: Evaluation) -> list[TaskResult]:
    """Return every task at every length that fits."""
    return [_task_result(evaluation, part, arrays["correct"]) for part, arrays in evaluation.of_kind("task")]


def _task_result(evaluation: Evaluation, part: Part, correct: Flags) -> TaskResult:
    plan, vocabulary = evaluation.plan, evaluation.session.vocabulary
    assert part.task is not None
    length = plan.length(part.multiple)
    drawn = draw_rows(part.task, length, plan.training_length, plan.task_samples, vocabulary, plan.seed)
    cells = []
    for distance in np.unique(drawn.distances).tolist():
        for depth in DEPTHS:
            for number, side in enumerate(SIDES):
                here = correct[(drawn.distances == distance) & (drawn.depths == depth) & (drawn.sides == number)]
                accuracy, answers = float(here.mean()), int(here.size)
                cells.append(TaskCell(distance=distance, depth=depth, side=side, accuracy=accuracy, answers=answers))
    return TaskResult(
        task=part.task,
        reading=part.intervention,
        multiple=part.multiple,
        length=length,
        chance=vocabulary.chance,
        accuracy=float(correct.mean()),
        accuracy_interval=wilson(int(correct.sum()), int(correct.size)),
        answers=int(correct.size),
        cells=cells,
    )


def attention_results(evaluation: Evaluation) -> list[AttentionResult]:
    """Return every triangle of every layer at every length that fits."""
    model = evaluation.session.config.model
    layers, sides = model.resolved_layers, TRIANGLES[model.attention]
    return [
        AttentionResult(
            multiple=part.multiple,
            layer=number + 1,
            triangle=side,
            window=layers[number].window,
            **dict(zip(FIELDS, values, strict=False)),
            by_distance=values[len(FIELDS) :],
        )
        for part, arrays in evaluation.of_kind("attention")
        for number, triangles in enumerate(arrays["statistics"].tolist())
        for side, values in zip(sides, triangles, strict=True)
    ]


def pseudo_results(evaluation: Evaluation) -> list[PseudoResult]:
    """Return one mask at a time against many."""
    results = []
    for part, arrays in evaluation.of_kind("pseudo"):
        rows = evaluation.rows(part.multiple)
        is_middle = middle_targets(rows)[rows.targets >= 0] & evaluation.first_targets(part.last)
        masked, single = evaluation.plain(part.multiple).losses[is_middle], arrays["losses"].astype(np.float64)
        estimate = DocumentBootstrap(evaluation.documents[is_middle], evaluation.plan.seed).mean(single)
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


def speed_results(evaluation: Evaluation) -> list[SpeedResult]:
    """Return the speed of plain scores; on several ranks, that of one of them while the others work too."""
    results = []
    for multiple in evaluation.multiples:
        arrays = evaluation.plain_arrays(multiple)
        seconds, positions = (sum(float(a[key]) for a in arrays) for key in ("seconds", "positions"))
        peak = max(int(a["peak_bytes"]) for a in arrays)
        results.append(
            SpeedResult(
                multiple=multiple,
                length=evaluation.plan.length(multiple),
                tokens_per_s=positions / seconds,
                peak_memory_bytes=None if peak < 0 else peak,
            )
        )
    return results
