"""Continuing a run from a checkpoint, on any number of ranks and at any ZeRO stage, in one step."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint.folder import list_checkpoints, load_state
from pretrain.checkpoint.format import TrainingState, step_of
from pretrain.checkpoint.tensors import SavedFragments
from pretrain.checkpoint.verify import newest_valid_checkpoint
from pretrain.errors import UserError
from pretrain.training.collectives import barrier
from pretrain.training.zero.engine import Engine
from pretrain.training.zero.optimizer import MOMENTS

log = logging.getLogger(__name__)


def agree_on_checkpoint(folder: Path, *, strict: bool) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that rank 0 finds valid, and a line for each newer one, on every rank; collective.

    Raises:
        UserError: on every rank. There are checkpoints but no valid one; or, if `strict`, a newer one is damaged.
    """
    box: list[tuple[str | None, list[str]]] = [(None, [])]
    if dist.get_rank() == 0:
        path, warnings = newest_valid_checkpoint(folder)
        box = [(path.name if path else None, warnings)]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    name, warnings = box[0]
    listed = "".join(f"\n  {warning}" for warning in warnings)
    if warnings and name is None:
        raise UserError(
            f"no checkpoint in {folder} is whole:{listed}\nRestore one from a backup, or move them away to start over"
        )
    if warnings and strict:
        raise UserError(
            f"damaged checkpoints in {folder}:{listed}\nWithout --strict (checkpoint.strict=true) the run resumes from "
            f"{name}; or restore them from a backup"
        )
    if name is None:
        return None, []
    return folder / name, [f"{warning}; resuming from {step_of(folder / name)}" for warning in warnings]


def newer_than(path: Path) -> list[str]:
    """Names of the checkpoints beside and after one: where that is the newest valid one, these are damaged."""
    return [other.name for other in list_checkpoints(path.parent) if step_of(other) > step_of(path)]


def is_of_another_optimizer(saved: SavedFragments, moments: Mapping[str, Collection[str]]) -> bool:
    """Whether it holds other moments than these of each parameter: all that an optimizer keeps, not a part of them."""
    there = saved.moments
    return there != {name: set(kinds) for name, kinds in moments.items()} and all(
        kinds in map(set, MOMENTS.values()) for kinds in there.values()
    )


def load_checkpoint(path: Path, engine: Engine) -> TrainingState:
    """Continue from a verified checkpoint, whatever ranks and stage wrote it; collective.

    From one of another kind of optimizer only the weights are taken, and the moments start over.

    Raises:
        UserError: it holds a model of another shape.
    """
    try:
        saved = SavedFragments(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    shapes = {name: tuple(shape) for name, shape in saved.index.shapes.items()}
    if shapes != engine.parameter_shapes:
        name = next(n for n in {**shapes, **engine.parameter_shapes} if shapes.get(n) != engine.parameter_shapes.get(n))
        raise UserError(
            f"{path} holds another model: {name} is {shapes.get(name, 'absent')} there and "
            f"{engine.parameter_shapes.get(name, 'absent')} in the config"
        )
    state = load_state(path)
    engine.set_optimizer_steps(state.optimizer_steps)
    fresh = is_of_another_optimizer(saved, engine.moments)
    if fresh:
        log.warning("%s is of another optimizer: its weights are loaded, moments and their steps start over", path)
        engine.forget_moments()
    for fragment in engine.partition.fragments():
        if fragment.kind == "weight" or not fresh:
            saved.fill(fragment.kind, fragment.parameter, fragment.start, fragment.tensor)
    engine.partition.refresh_weights()
    barrier()
    return state
