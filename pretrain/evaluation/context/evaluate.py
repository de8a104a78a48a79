"""One evaluation from end to end: plan, parts, report. What the command line and a rank call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch

from pretrain.checkpoint.folder import load_state
from pretrain.checkpoint.verify import find_checkpoint
from pretrain.config.run import RunConfig
from pretrain.evaluation.context.plan import EvaluationPlan, Part, PartKind, Progress
from pretrain.evaluation.context.planning import plan_evaluation
from pretrain.evaluation.context.recalibrate import recalibrated_plan
from pretrain.evaluation.context.request import Request
from pretrain.evaluation.context.results.curves import recalibrated_results
from pretrain.evaluation.context.results.evaluation import Evaluation
from pretrain.evaluation.context.results.report import build_report
from pretrain.evaluation.context.session import Session, checkpoint_digest
from pretrain.evaluation.context.work import is_missing, missing_parts, run_parts
from pretrain.evaluation.report.schema import ContextReport, RecalibrationResult
from pretrain.run.folder import RunFolder

RunOnRanks = Callable[[EvaluationPlan, Path, int], None]
"""Have the missing parts of a plan computed by so many ranks; raises if that failed."""

STAGES: dict[PartKind, str] = {"scores": "losses", "task": "tasks", "attention": "attention", "pseudo": "single masks"}


@dataclass(frozen=True)
class FinishedEvaluation:
    """An evaluation, and where it lies."""

    report: ContextReport
    folder: Path
    session: Session


def this_device() -> torch.device:
    """Return the device of a process without ranks."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_evaluation(
    request: Request,
    report: Progress = lambda *_: None,
    *,
    ranks: int = 1,
    run_on_ranks: RunOnRanks | None = None,
    command: Sequence[str] = (),
) -> FinishedEvaluation:
    """Measure what is asked for, going on where the same request was interrupted; nothing is written but parts.

    Args:
        request: what to measure.
        report: is told of the progress.
        ranks: how many processes compute parts.
        run_on_ranks: starts them; not needed for one.
        command: what the user typed, for the report.

    Raises:
        UserError: see `plan_evaluation`.
    """
    device = this_device()
    plan, folder, documents = plan_evaluation(request, device)
    if ranks > 1 and run_on_ranks is not None and missing_parts(folder, plan):
        run_on_ranks(plan, folder, ranks)
    session = Session(plan, device, documents)
    _run_here(session, folder, report)
    return FinishedEvaluation(build_report(Evaluation(session, folder), ranks, command), folder, session)


def evaluate_recalibrated(
    finished: FinishedEvaluation, config: RunConfig, tokens: int, report: Progress
) -> FinishedEvaluation:
    """Add to a report what the run `config`, which went on from the report's checkpoint on long rows, has become."""
    before, run = finished.session, RunFolder.of(config)
    checkpoint = find_checkpoint(run.checkpoints)
    step, digest = load_state(checkpoint).step, checkpoint_digest(checkpoint)
    session = Session(recalibrated_plan(before.plan, config, step, digest), before.device, before.documents)
    folder = run.evaluation / "context"
    _run_here(session, folder, report)
    result = RecalibrationResult(
        tokens=tokens,
        length=session.config.data.sequence_length,
        seconds=sum(r["seconds"] for r in run.metrics() if "loss" in r),
        run_folder=str(run.path),
        results=recalibrated_results(Evaluation(before, finished.folder), Evaluation(session, folder)),
    )
    updated = finished.report.model_copy(update={"recalibrations": [*finished.report.recalibrations, result]})
    return replace(finished, report=updated)


def _run_here(session: Session, folder: Path, report: Progress) -> None:
    """Compute what is missing, stage by stage."""
    for kind, stage in STAGES.items():
        parts = [part for part in session.plan.parts() if part.kind == kind]
        _run_stage(session, folder, parts, partial(report, stage))


def _run_stage(session: Session, folder: Path, parts: Sequence[Part], report: Callable[[int, int], None]) -> None:
    missing = [part for part in parts if is_missing(folder, session.plan, part)]
    done = count(len(parts) - len(missing))

    def show(_: Part | None = None) -> None:
        report(next(done), len(parts))

    if missing:
        show()
        run_parts(session, missing, folder, show)
