"""Making a plan: which lengths can be measured on which documents, and what fits into a time limit."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pretrain.checkpoint.folder import load_state
from pretrain.checkpoint.format import TrainingState
from pretrain.checkpoint.verify import find_checkpoint
from pretrain.config.run import RunConfig
from pretrain.config.section import Section
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.evaluation.context.interventions import ABLATIONS, INTERVENTIONS, reason_against
from pretrain.evaluation.context.plan import TASKS, EvaluationPlan
from pretrain.evaluation.context.request import Request
from pretrain.evaluation.context.session import Session, checkpoint_digest, config_of_run
from pretrain.evaluation.context.windows import TokenIds, long_documents, make_rows, window_length
from pretrain.files import write_json
from pretrain.run.folder import RunFolder

MIN_DOCUMENTS = 4
"""Fewer documents than this say nothing about a length."""

PLAN_FILE = "plan.json"

FULL = {"windows": 4, "reading_windows": 8, "task_samples": 8, "attention_windows": 4, "pseudo_targets": 8}
"""How many times the configured numbers `--full` takes."""

_BUDGET_USED = 0.8
"""Share of a time limit that is planned with."""

_TIMED_POSITIONS = 8192


class _SavedPlan(Section):
    """plan.json: which request made the plan, so that the same one goes on with it."""

    request: dict[str, str]
    plan: EvaluationPlan


def plan_evaluation(request: Request, device: torch.device) -> tuple[EvaluationPlan, Path, list[TokenIds]]:
    """Plan an evaluation, or take up the plan of the same request that was interrupted.

    Returns:
        The plan, the folder of its report, and the documents that its windows are drawn from.

    Raises:
        UserError: no such run, checkpoint or split, another tokenizer, no documents that are long enough, learned
            positions beyond their table, or a time limit that is too short for anything.
    """
    config = config_of_run(request.run_folder, request.corpus, request.overrides)
    manifest = load_manifest(config.corpus.path)
    checkpoint = find_checkpoint(RunFolder(request.run_folder).checkpoints, request.step)
    state = load_state(checkpoint)
    if request.corpus is None and state.fingerprint != manifest.fingerprint:
        raise UserError(
            f"{checkpoint} was trained on another corpus than {config.corpus.path} is now: its tokens may differ. "
            "Restore that corpus, or name this one with --corpus if it is of the same tokenizer"
        )
    config = config.in_phase(config.phase_at(state.tokens_seen))
    documents = long_documents(config, manifest)
    plan = _whole_plan(request, config, checkpoint, state, [len(ids) for ids in documents])
    folder = request.report_folder(config.evaluation.split)
    asked = {key: str(value) for key, value in (asdict(request) | {"base": plan.key}).items()}
    saved = _saved_plan(folder / PLAN_FILE)
    if saved is not None and saved.request == asked:
        return saved.plan, folder, documents
    if request.budget_s is not None:
        plan = _within_budget(plan, request.budget_s, device, documents)
    write_json(folder / PLAN_FILE, _SavedPlan(request=asked, plan=plan).model_dump(mode="json"))
    return plan, folder, documents


def _whole_plan(
    request: Request, config: RunConfig, checkpoint: Path, state: TrainingState, document_lengths: Sequence[int]
) -> EvaluationPlan:
    """Return all that can be measured, without regard to a time limit."""
    evaluation, block = config.evaluation, config.data.sequence_length
    multiples, skipped = _measurable(request, config, document_lengths)
    names = (*INTERVENTIONS, *ABLATIONS)
    reasons: dict[str, str] = {
        name: why for name in names if (why := reason_against(name, config.model, block)) is not None
    }
    numbers = {key: getattr(evaluation, key) * (FULL[key] if request.full else 1) for key in FULL}
    longest = window_length(multiples[-1], block)
    return EvaluationPlan(
        run_folder=request.run_folder,
        step=state.step,
        checkpoint_sha256=checkpoint_digest(checkpoint),
        corpus=config.corpus.path,
        fingerprint=load_manifest(config.corpus.path).fingerprint,
        split=evaluation.split,
        seed=config.seed,
        training_length=block,
        multiples=multiples,
        skipped={**skipped, **reasons},
        interventions=[name for name in INTERVENTIONS if name not in reasons],
        ablations=[name for name in ABLATIONS if name not in reasons],
        tasks=list(TASKS if request.full else ("passkey", "copy")),
        tokens_per_batch=evaluation.tokens_per_batch,
        context_threshold=evaluation.context_threshold,
        **_bounded(numbers, sum(n // block for n in document_lengths if n >= longest)),
    )


def load_plan(folder: Path) -> EvaluationPlan:
    """The plan of a report's folder.

    Raises:
        UserError: there is none.
    """
    saved = _saved_plan(folder / PLAN_FILE)
    if saved is None:
        raise UserError(f"there is no plan of an evaluation in {folder}; run `diptych evaluate context` again")
    return saved.plan


def _saved_plan(path: Path) -> _SavedPlan | None:
    try:
        return _SavedPlan.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _bounded(numbers: dict[str, int], blocks: int) -> dict[str, Any]:
    """Return no more windows than there are blocks to draw, and no more in parts of them than there are windows."""
    windows = numbers["windows"] = min(numbers["windows"], blocks)
    parts = ("reading_windows", "attention_windows", "pseudo_targets")
    return {key: min(value, windows) if key in parts else value for key, value in numbers.items()}


def _measurable(
    request: Request, config: RunConfig, document_lengths: Sequence[int]
) -> tuple[list[float], dict[str, str]]:
    """The multiples that can be measured, ascending, and why the others cannot.

    Raises:
        UserError: a length that was asked for by name cannot be measured, or the training length cannot.
    """
    wanted = sorted({1.0, *(request.lengths or config.evaluation.lengths)})
    fits, skipped = [], {}
    for multiple in wanted:
        try:
            length = window_length(multiple, config.data.sequence_length)
        except UserError:
            if request.lengths is not None:
                raise
            skipped[f"{multiple:g}x"] = f"no whole part or multiple of {config.data.sequence_length} tokens"
            continue
        enough = sum(n >= length for n in document_lengths)
        if config.model.positions == "learned" and length > config.model.max_positions:
            skipped[f"{multiple:g}x"] = f"{length} positions are beyond the {config.model.max_positions} learned ones"
        elif enough < MIN_DOCUMENTS:
            skipped[f"{multiple:g}x"] = (
                f"documents of the {config.evaluation.split} split with {length:,} tokens: {enough}"
            )
        else:
            fits.append(multiple)
    if 1.0 not in fits or (request.lengths is not None and skipped):
        name, why = next(iter(skipped.items()))
        raise UserError(f"a context of {name} cannot be measured: {why}. {_offer(config, document_lengths, fits)}")
    return fits, skipped


def _offer(config: RunConfig, document_lengths: Sequence[int], fits: Sequence[float]) -> str:
    """What there is, and what to do."""
    length = config.data.sequence_length
    there: list[str] = []
    while (count := sum(n >= length for n in document_lengths)) or not there:
        there.append(f"{count} of {length} or more tokens")
        length *= 2
    use = f"Use --lengths {','.join(f'{m:g}x' for m in fits)}" if 1.0 in fits else "Use a corpus of longer documents"
    return (
        f"{MIN_DOCUMENTS} documents are needed for each length; the {config.evaluation.split} split of "
        f"{config.corpus.path} has {', '.join(there)}. {use}, another --split, or another --corpus of its tokenizer"
    )


# ------------------------------------------------------------------------------------------------ the time limit


def _within_budget(
    plan: EvaluationPlan, budget_s: float, device: torch.device, documents: list[TokenIds]
) -> EvaluationPlan:
    """The most that fits: fewer windows and samples first, then without the longest lengths.

    Raises:
        UserError: not even the training length fits.
    """
    seconds = time_positions(Session(plan, device, documents))
    available, skipped = _BUDGET_USED * budget_s, dict(plan.skipped)
    multiples = list(plan.multiples)
    while True:
        for share in (1, 2, 4, 8):
            numbers = {key: max(getattr(plan, key) // share, min(getattr(plan, key), _LEAST[key])) for key in FULL}
            update = {**numbers, "multiples": multiples, "skipped": skipped}
            tried = EvaluationPlan.model_validate(plan.model_dump() | update)
            expected = sum(part.positions * seconds[part.multiple] for part in tried.parts())
            if expected <= available:
                text = (
                    f"{budget_s:.0f} s: planned {expected:.0f} s with {numbers['windows']} windows, "
                    f"{numbers['reading_windows']} for interventions, at {', '.join(f'{m:g}x' for m in multiples)}"
                )
                return tried.model_copy(update={"budget": text})
        if multiples[-1] <= 1:
            raise UserError(
                f"a budget of {budget_s:.0f} s is too short even for the training length alone, which takes about "
                f"{expected / _BUDGET_USED:.0f} s; give more with --budget"
            )
        dropped = multiples.pop()
        skipped[f"{dropped:g}x"] = f"left out for the budget of {budget_s:.0f} s"


_LEAST = {"windows": 32, "reading_windows": 8, "task_samples": 1, "attention_windows": 1, "pseudo_targets": 16}
"""A time limit leaves at least so much of everything."""


@torch.inference_mode()
def time_positions(session: Session) -> dict[float, float]:
    """Multiple -> seconds for a position of its rows, measured on a few rows."""
    plan, seconds = session.plan, {}
    for multiple in plan.multiples:
        length = plan.length(multiple)
        some = session.windows[: max(1, _TIMED_POSITIONS // max(length, plan.training_length))]
        rows = make_rows(some, length, plan.training_length, session.rule, plan.seed)
        session.in_batches(rows, session.score)
        started = time.perf_counter()
        session.in_batches(rows, session.score)
        seconds[multiple] = (time.perf_counter() - started) / rows.inputs.size
    return seconds
