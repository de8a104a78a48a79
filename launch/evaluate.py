"""`diptych evaluate context`: the evaluation with progress, on one process or several, and its report on a terminal."""

import sys
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from launch.local.display import PlainDisplay, make_display
from launch.local.ranks import num_gpus
from launch.local.supervisor import run_ranks
from launch.local.training import launch_local
from launch.terminal.console import say
from launch.terminal.progress import StageProgress
from launch.terminal.tables import fitting_table
from pretrain.data.manifest import load_manifest
from pretrain.errors import EXIT_DONE, EXIT_RESUME_ME, EXIT_WRONG_INPUT, UserError
from pretrain.evaluation.context.request import Request
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder

if TYPE_CHECKING:
    from pretrain.evaluation.context.evaluate import FinishedEvaluation
    from pretrain.evaluation.context.plan import EvaluationPlan
    from pretrain.evaluation.report.schema import ContextReport

_LOOK_EVERY = 5
"""Looks of the supervisor between two counts of finished parts."""


class EvaluationFailedError(Exception):
    """A rank failed; its last lines have been shown."""


def evaluate_context(
    request: Request,
    console: Console,
    *,
    num_ranks: int = 1,
    recalibrate: int | None = None,
    command: Sequence[str] = (),
) -> None:
    """Measure how the encoder reads sequences longer than it was trained on; print the table, write the report.

    Args:
        request: what to measure.
        console: for progress and the table.
        num_ranks: processes that compute.
        recalibrate: also train for so many more tokens at the longest length, in a run of its own, and measure again.
        command: what the user typed, for the report.

    Raises:
        UserError: see `plan_evaluation`; or more ranks than GPUs.
        KeyboardInterrupt: the ranks were asked to stop; the same command goes on.
        EvaluationFailedError: a rank failed.
    """
    from pretrain.evaluation.context.evaluate import run_evaluation
    from pretrain.evaluation.report.writing import write_context_report

    gpus = num_gpus()
    if gpus and num_ranks > gpus:
        raise UserError(f"--nproc {num_ranks}, but this machine has {gpus} GPUs for one rank each; use at most {gpus}")
    with StageProgress(console) as progress:

        def run_on_ranks(plan: "EvaluationPlan", folder: Path, ranks: int) -> None:
            _run_on_ranks(plan, folder, ranks, console, progress.report)

        finished = run_evaluation(request, progress.report, ranks=num_ranks, run_on_ranks=run_on_ranks, command=command)
    if recalibrate is not None:
        finished = _recalibrated(finished, recalibrate, num_ranks, console)
    write_context_report(RunFolder(request.run_folder), finished.folder, finished.report)
    show_report(finished.report, finished.folder, console)


def _recalibrated(
    finished: "FinishedEvaluation", tokens: int, num_ranks: int, console: Console
) -> "FinishedEvaluation":
    """Train on long rows from the report's checkpoint on, or go on with that training, and measure it."""
    from pretrain.config.topology import check_topology
    from pretrain.evaluation.context.evaluate import evaluate_recalibrated
    from pretrain.evaluation.context.recalibrate import recalibration_config

    session = finished.session
    config = recalibration_config(session.plan, tokens, num_ranks)
    check_topology(config, num_ranks)
    open_run_folder(config, load_manifest(config.corpus.path))
    run = RunFolder.of(config)
    run.begin_with(session.plan.checkpoint)
    status = run.status()
    if status is None or status.state != "done":
        say(console, f"recalibrating for {tokens:,} tokens at the longest length, in {run}")
        exit_code = launch_local(config, num_ranks, make_display(console))
        if exit_code == EXIT_RESUME_ME:
            raise KeyboardInterrupt
        if exit_code != EXIT_DONE:
            raise EvaluationFailedError(f"the recalibration failed; its log: {run.logs}")
    with StageProgress(console) as progress:
        return evaluate_recalibrated(finished, config, tokens, progress.report)


def show_report(report: "ContextReport", folder: Path, console: Console) -> None:
    """The curve, the headline, and where the rest is."""
    from pretrain.evaluation.report.sections import length_table

    title = f"Context extension of {report.run}, step {report.step}"
    table = length_table(report)
    # The last column, a difference to the row above, is for the page.
    rows = [row[:-1] for row in table.texts]
    console.print(fitting_table(console, title, table.header[:-1], rows, dispensable="95 %"))
    say(console, report.headline, "bold")
    for what, why in report.skipped.items():
        if what.endswith("x"):
            say(console, f"{what} was not measured: {why}")
    if report.budget:
        say(console, f"budget of {report.budget}")
    say(
        console,
        f"Loss in nats per masked token; token frequencies alone cost {report.unigram_loss:.3f} on these tokens "
        f"(unigram entropy {report.unigram_entropy:.3f}).",
    )
    say(console, f"report: {folder / 'report.html'}, report.md, report.json")


def _run_on_ranks(
    plan: "EvaluationPlan", folder: Path, num_ranks: int, console: Console, report: Callable[[str, int, int], None]
) -> None:
    """Have the parts of a plan computed by processes of this machine; must be called from the main thread."""
    from pretrain.evaluation.context.work import missing_parts

    logs = RunFolder(plan.run_folder).evaluation_logs(folder.name)
    total, looks = len(plan.parts()), count()

    def show_parts() -> None:
        report(f"parts on {num_ranks} ranks", total - len(missing_parts(folder, plan)), total)

    def refresh() -> None:
        if next(looks) % _LOOK_EVERY == 0:
            show_parts()

    command = [sys.executable, "-P", "-m", "pretrain.evaluation", str(folder)]
    end = run_ranks(command, num_ranks, lambda rank: logs / f"rank-{rank:04d}.log", PlainDisplay(console), refresh)
    show_parts()
    if end.exit_code == EXIT_DONE:
        return
    if end.exit_code == EXIT_RESUME_ME or end.was_asked_to_stop:
        raise KeyboardInterrupt
    if end.exit_code == EXIT_WRONG_INPUT:
        raise UserError(f"the evaluation could not go on; the whole log: {logs}")
    raise EvaluationFailedError(f"a rank failed; the whole log: {logs}")
