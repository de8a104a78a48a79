"""Verifying: which checkpoints are whole, to the last byte."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretrain.checkpoint.folder import damage_of, describe_damage, list_checkpoints
from pretrain.checkpoint.format import (
    MANIFEST_FILE,
    STATE_FILE,
    checkpoint_name,
    read_manifest,
    read_state,
    step_of,
)
from pretrain.checkpoint.logits import read_logits
from pretrain.checkpoint.tensors import SavedFragments
from pretrain.errors import UserError

log = logging.getLogger(__name__)


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint, a line for each file; nothing, if it is whole.

    Every file must have the manifest's size and sha256, none may be missing or foreign, and what is in them must fit
    together.
    """
    try:
        manifest = read_manifest(path)
        there = {file.name for file in path.iterdir()} - {MANIFEST_FILE}
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = [f"{name} does not belong to it" for name in sorted(there - manifest.files.keys())]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: damage_of(path / name, manifest.files[name]), manifest.files)
        problems += [f"{name} is {damage}" for name, damage in zip(manifest.files, found, strict=True) if damage]
    if problems:
        return problems
    try:
        SavedFragments(path).check()
        read_logits(path)
        if read_state(path).step != manifest.step:
            return [f"{STATE_FILE} is of another step"]
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def newest_valid_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    warnings: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problems = verify_checkpoint(path)
        if not problems:
            return path, warnings
        warnings.append(describe_damage(path, problems))
    return None, warnings


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """A valid checkpoint in a run's `checkpoints/`: that of `step`, or the newest; warns of damaged ones after it.

    Raises:
        UserError: there is none, or it is damaged; says which there are.
    """
    there = ", ".join(str(step_of(path)) for path in list_checkpoints(folder)) or "none"
    if step is None:
        path, warnings = newest_valid_checkpoint(folder)
        if path is None:
            raise UserError(f"no valid checkpoint in {folder}; train first. {'; '.join(warnings)}".strip())
        for warning in warnings:
            log.warning("%s; taking step %d", warning, step_of(path))
        return path
    path = folder / checkpoint_name(step)
    if path not in list_checkpoints(folder):
        raise UserError(f"no checkpoint of step {step} in {folder}; there are: {there}")
    if problems := verify_checkpoint(path):
        raise UserError(f"{describe_damage(path, problems)}; there are: {there}")
    return path
