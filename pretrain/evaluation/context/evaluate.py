"""One evaluation from end to end: plan, parts, report. What the command line and a rank call."""

import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from pretrain import __version__
from pretrain.checkpoint.folder import load_state
from pretrain.checkpoint.verify import find_checkpoint
from pretrain.config.run import RunConfig
from pretrain.evaluation.context.plan import Part, Plan, Progress
from pretrain.evaluation.context.planning import Request, make_plan
from pretrain.evaluation.context.recalibrate import plan_of, recalibration_result
from pretrain.evaluation.context.results import Evaluation, effective_multiple, held_multiple, used_multiple
from pretrain.evaluation.context.session import Session, checkpoint_digest
from pretrain.evaluation.context.statistics import entropy_of_counts
from pretrain.evaluation.context.work import missing_parts, part_path, run_parts
from pretrain.evaluation.report.schema import ContextReport, LengthResult, Provenance
from pretrain.run.folder import RunFolder

RunOnRanks = Callable[[Plan, Path, int], None]
"""Have the missing parts of a plan computed by so many ranks; raises if that failed."""


LITTLE_LEARNED = 0.95
"""A loss at 1x above this share of that of token frequencies alone is cautioned against."""


FEW_DOCUMENTS = 20
"""Fewer than these are cautioned against: the spread between them is hardly known, and resampling cannot add to it."""


STAGES = {"scores": "losses", "task": "tasks", "attention": "attention", "pseudo": "single masks"}


@dataclass(frozen=True)
class Finished:
    """An evaluation, and where it lies."""

    report: ContextReport
    folder: Path
    session: Session


def this_device() -> torch.device:
    """Where a process without ranks computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluate(
    request: Request,
    report: Progress = lambda *_: None,
    *,
    ranks: int = 1,
    run_on_ranks: RunOnRanks | None = None,
    command: Sequence[str] = (),
) -> Finished:
    """Measure what is asked for, going on where the same request was interrupted; nothing is written but parts.

    Args:
        request: what to measure.
        report: is told of the progress.
        ranks: how many processes compute parts.
        run_on_ranks: starts them; not needed for one.
        command: what the user typed, for the report.

    Raises:
        UserError: see `make_plan`.
    """
    device = this_device()
    plan, folder, documents = make_plan(request, device)
    if ranks > 1 and run_on_ranks is not None and missing_parts(folder, plan):
        run_on_ranks(plan, folder, ranks)
    session = Session(plan, device, documents)
    _run_here(session, folder, report)
    return Finished(build_report(session, folder, ranks, command), folder, session)


def evaluate_recalibrated(finished: Finished, config: RunConfig, tokens: int, report: Progress) -> Finished:
    """Add to a report what the run `config`, which went on from the report's checkpoint on long rows, has become."""
    before = finished.session
    run = RunFolder.of(config)
    checkpoint = find_checkpoint(run.checkpoints)
    state = load_state(checkpoint)
    plan = plan_of(before.plan, config, state.step, checkpoint_digest(checkpoint))
    session = Session(plan, before.device, before.documents)
    folder = run.evaluation / "context"
    _run_here(session, folder, report)
    steps = [r for r in run.metrics() if "loss" in r]
    result = recalibration_result(
        Evaluation(before, finished.folder), session, folder, tokens, sum(r["seconds"] for r in steps)
    )
    updated = finished.report.model_copy(update={"recalibrations": [*finished.report.recalibrations, result]})
    return replace(finished, report=updated)


def _run_here(session: Session, folder: Path, report: Progress) -> None:
    """What is missing, stage by stage."""
    plan = session.plan
    parts = plan.parts()
    for kind, stage in STAGES.items():
        of_kind = [part for part in parts if part.kind == kind]
        missing = [part for part in of_kind if not part_path(folder, plan, part).is_file()]
        finished = len(of_kind) - len(missing)

        def done(_: Part, stage: str = stage, total: int = len(of_kind)) -> None:
            nonlocal finished
            finished += 1
            report(stage, finished, total)

        if missing:
            report(stage, finished, len(of_kind))
        run_parts(session, missing, folder, done)


def build_report(session: Session, folder: Path, ranks: int, command: Sequence[str]) -> ContextReport:
    """Put the parts together; the same numbers whoever computed them."""
    plan, config = session.plan, session.config
    evaluation = Evaluation(session, folder)
    results = evaluation.length_results()
    counts = session.token_counts.astype(np.float64)
    smoothed = (counts + 1) / (counts + 1).sum()
    held, effective = held_multiple(results), effective_multiple(results)
    state = load_state(plan.checkpoint)
    unigram_loss = float(-np.log(smoothed[evaluation.targets]).mean())
    documents = evaluation.bootstrap.num_documents
    readings, ablations = evaluation.reading_results(plan.readings), evaluation.ablation_results()
    tasks, attention, pseudo = evaluation.task_results(), evaluation.attention_results(), evaluation.pseudo_results()
    return ContextReport(
        headline=" ".join([headline(results), *cautions(results, documents, unigram_loss)]),
        run=config.name,
        step=plan.step,
        tokens_seen=state.tokens_seen,
        training_length=plan.training_length,
        split=plan.split,
        corpus=config.corpus.path.name,
        documents=documents,
        windows=len(session.windows),
        targets=len(evaluation.targets),
        reading_windows=min(plan.reading_windows, len(session.windows)),
        unigram_entropy=entropy_of_counts(counts),
        unigram_loss=unigram_loss,
        effective_multiple=effective,
        effective_length=plan.length(effective),
        used_multiple=used_multiple(results),
        held_multiple=held,
        results=results,
        skipped=evaluation.skipped,
        context_need=evaluation.context_need(),
        profiles=evaluation.profiles(),
        readings=readings,
        ablations=ablations,
        tasks=tasks,
        attention=attention,
        pseudo=pseudo,
        speed=evaluation.speed_results(),
        recalibrations=[],
        budget=plan.budget,
        settings=_settings(plan),
        model=_model_in_words(config),
        provenance=Provenance(
            command=shlex.join(command),
            diptych=__version__,
            torch=torch.__version__,
            device=torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu",
            ranks=ranks,
            seed=plan.seed,
            config=str(RunFolder(plan.run_folder).config_file),
            corpus=str(plan.corpus),
            fingerprint=plan.fingerprint,
            tokenizer_sha256=session.manifest.tokenizer.sha256,
            checkpoint_sha256=plan.checkpoint_sha256,
            written=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        ),
    )


def cautions(results: Sequence[LengthResult], documents: int, unigram_loss: float) -> list[str]:
    """Sentences against reading too much into a headline.

    Args:
        results: by length.
        documents: that the windows come from.
        unigram_loss: nats per target of a model that knows only how often each token occurs.
    """
    found, base = [], next(r for r in results if r.multiple == 1)
    if base.loss > LITTLE_LEARNED * unigram_loss:
        found.append(
            f"Caution: at 1x the loss is {base.loss:.3f}, and token frequencies alone cost {unigram_loss:.3f}: this "
            "encoder has learned little yet, and may read otherwise once it has."
        )
    if documents < FEW_DOCUMENTS:
        found.append(f"Caution: all windows come from {documents} documents; intervals over so few are too narrow.")
    return found


def _settings(plan: Plan) -> dict[str, str | int | float]:
    return {
        "windows": plan.windows,
        "reading_windows": plan.reading_windows,
        "task_samples": plan.task_samples,
        "attention_windows": plan.attention_windows,
        "pseudo_targets": plan.pseudo_targets,
        "context_threshold": plan.context_threshold,
        "tokens_per_batch": plan.tokens_per_batch,
    }


def _model_in_words(config: RunConfig) -> dict[str, str]:
    model = config.model
    spans = ["global" if layer.window is None else f"{layer.window}" for layer in model.resolved_layers]
    positions: list[str] = [layer.positions or "none" for layer in model.resolved_layers]
    if model.positions == "learned":
        positions = ["learned"]
    return {
        "attention": model.attention.replace("_", "-"),
        "layers": f"{model.num_layers} of width {model.hidden_size}",
        "spans": ", ".join(dict.fromkeys(spans)),
        "positions": ", ".join(dict.fromkeys(positions)),
    }


def headline(results: Sequence[LengthResult]) -> str:
    """The answer in a sentence or two."""
    held, effective = held_multiple(results), effective_multiple(results)
    by_multiple = {r.multiple: r for r in results}
    base = by_multiple[1.0].length
    if not any(r.multiple > 1 for r in results):
        return (
            f"Nothing beyond the training length of {base} tokens was measured; what was left out is listed with why."
        )
    if effective > 1:
        r = by_multiple[effective]
        text = (
            f"Effective length {effective:g}x, {r.length:,} tokens: up to there the loss is held, and what lies beyond "
            f"the {base} tokens of the training lowers it, by {r.gain:.3f} nats at {effective:g}x "
            f"({r.gain_interval[0]:.3f} to {r.gain_interval[1]:.3f})."
        )
        used = used_multiple(results)
        if used < effective:
            text += f" But beyond {used:g}x a longer window gains nothing over a shorter one."
    else:
        text = f"No extension: beyond the {base} tokens of the training, more context does not lower the loss at 2x."
        if 2.0 not in by_multiple:
            first = min(m for m in by_multiple if m > 1)
            text = text.replace("2x", f"{first:g}x")
    longest = results[-1]
    if held == longest.multiple:
        return f"{text} The loss is held up to {held:g}x, the longest length measured."
    worse = math.exp(longest.loss - by_multiple[1.0].loss)
    at = f"at {longest.multiple:g}x perplexity is {worse:.2f} times that at 1x"
    return f"{text} The loss is held up to {held:g}x; {at}."
