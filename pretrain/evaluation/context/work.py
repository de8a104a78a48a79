"""Computing the parts of a plan, on any number of ranks, and keeping each as a file of its own.

A file appears whole or not at all, and no rank waits for another: what is there is done.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pretrain.evaluation.context.attention_statistics import LARGEST_LOGIT, watch_attention
from pretrain.evaluation.context.plan import EvaluationPlan, Part
from pretrain.evaluation.context.session import DoesNotFitError, Session
from pretrain.evaluation.context.tasks import draw_rows
from pretrain.evaluation.context.windows import WindowRows, make_rows, single_mask_rows
from pretrain.files import atomic_path
from pretrain.training.monitor.peak_memory import PeakMemory

Arrays = dict[str, npt.NDArray[Any]]


def parts_folder(folder: Path, plan: EvaluationPlan) -> Path:
    """Return the folder of a plan's parts, inside the report's."""
    return folder / "parts" / plan.key


def part_file(folder: Path, plan: EvaluationPlan, part: Part) -> Path:
    """The file of a part."""
    return parts_folder(folder, plan) / f"{part.name}.npz"


def is_missing(folder: Path, plan: EvaluationPlan, part: Part) -> bool:
    """Whether a part is not done yet."""
    return not part_file(folder, plan, part).is_file()


def missing_parts(folder: Path, plan: EvaluationPlan) -> list[Part]:
    """Parts that are not done yet."""
    return [part for part in plan.parts() if is_missing(folder, plan, part)]


def run_parts(
    session: Session,
    parts: Sequence[Part],
    folder: Path,
    done: Callable[[Part], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Compute parts and write them; `done` is called after each. Returns False if `stop` said so before the end."""
    for part in parts:
        if stop():
            return False
        with atomic_path(part_file(folder, session.plan, part)) as temporary, temporary.open("wb") as file:
            np.savez(file, **compute_part(session, part))  # type: ignore[arg-type]
        done(part)
    return True


def load_part(folder: Path, plan: EvaluationPlan, part: Part) -> Arrays:
    """What `compute_part` returned."""
    with np.load(part_file(folder, plan, part), allow_pickle=False) as file:
        return dict(file)


@torch.inference_mode()
def compute_part(session: Session, part: Part) -> Arrays:
    """The numbers of a part; {"skipped": why} where its rows do not fit into memory."""
    memory, started = PeakMemory(session.device), time.perf_counter()
    try:
        with session.intervene(part.intervention, session.plan.length(part.multiple), part.factor):
            arrays = _COMPUTE[part.kind](session, part)
    except DoesNotFitError as error:
        return {"skipped": np.array(str(error))}
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
    arrays["seconds"] = np.array(time.perf_counter() - started)
    peak = memory.bytes()
    arrays["peak_bytes"] = np.array(-1 if peak is None else peak)
    return arrays


def _scored(session: Session, rows: WindowRows) -> Arrays:
    pieces = session.in_batches(rows, session.score)
    losses, correct = (np.concatenate(column) for column in zip(*pieces, strict=True))
    return {"losses": losses, "correct": correct, "positions": np.array(rows.inputs.size)}


def _scores(session: Session, part: Part) -> Arrays:
    """Losses at the targets of some windows."""
    plan = session.plan
    some = session.windows[part.first : part.last]
    length = plan.length(part.multiple)
    return _scored(session, make_rows(some, length, plan.training_length, session.rule, plan.seed))


def _pseudo(session: Session, part: Part) -> Arrays:
    """Losses of single masks."""
    plan = session.plan
    some = session.windows[part.first : part.last]
    length = plan.length(part.multiple)
    return _scored(session, single_mask_rows(some, length, plan.training_length, session.rule, plan.seed))


def _task(session: Session, part: Part) -> Arrays:
    """Whether each answer is right, [rows, answers]: the most likely of the candidates is taken."""
    plan, vocabulary = session.plan, session.vocabulary
    assert part.task is not None
    length = plan.length(part.multiple)
    drawn = draw_rows(part.task, length, plan.training_length, plan.task_samples, vocabulary, plan.seed)
    candidates = torch.from_numpy(vocabulary.candidates).to(session.device)
    rows = WindowRows(drawn.inputs, drawn.targets)

    def answer(some: WindowRows) -> npt.NDArray[np.bool_]:
        states, wanted = session.hidden(some)
        scores = states @ session.model.head.weight[candidates].float().T
        right: npt.NDArray[np.bool_] = (candidates[scores.argmax(dim=-1)] == wanted).cpu().numpy()
        return right

    right = np.concatenate(session.in_batches(rows, answer))
    return {"correct": right.reshape(len(drawn.inputs), -1)}


def _attention(session: Session, part: Part) -> Arrays:
    """Means over windows of what `triangle_statistics` returns, [layers, triangles, fields]."""
    plan = session.plan
    some = session.windows[part.first : part.last]
    rows = make_rows(some, plan.length(part.multiple), plan.training_length, session.rule, plan.seed)
    seen: list[list[torch.Tensor]] = []

    def look(batch: WindowRows) -> tuple[torch.Tensor, int]:
        session.encode(batch)
        return torch.stack(seen[-1]), len(batch.inputs)

    with watch_attention(session.model.encoder, seen):
        tables, sizes = zip(*session.in_batches(rows, look), strict=True)
    values = torch.stack(tables).double().numpy()
    mean = np.average(values, axis=0, weights=sizes)
    mean[..., LARGEST_LOGIT] = values[..., LARGEST_LOGIT].max(axis=0)
    return {"statistics": mean}


_COMPUTE: dict[str, Callable[[Session, Part], Arrays]] = {
    "scores": _scores,
    "pseudo": _pseudo,
    "task": _task,
    "attention": _attention,
}
