"""The folder of a run's checkpoints: listed, verified, found, pruned and cleared of leftovers."""

import logging
import re
import secrets
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pretrain.checkpoint.format import (
    MANIFEST,
    STATE,
    FileEntry,
    SavedFragments,
    TrainingState,
    read_logits,
    read_manifest,
    read_state,
    step_of,
)
from pretrain.checkpoint.format import checkpoint_name as checkpoint_name
from pretrain.errors import UserError
from pretrain.files import sha256_of

log = logging.getLogger(__name__)


BEING_WRITTEN, REPLACED, REMOVED = "tmp", "replaced", "removed"
"""Suffixes of hidden folders: what a save has not finished, what a save has put aside, what is being deleted."""


# ------------------------------------------------------------------------------------------------------- folders


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run's `checkpoints/`, oldest first, damaged ones among them."""
    found = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,18}", path.name) and path.is_dir())
    return sorted(found, key=step_of)


def hidden_name(step_name: str, suffix: str) -> str:
    """A name beside the checkpoints that nobody can guess and that is never taken for one of them."""
    return f".{step_name}.{secrets.token_hex(8)}.{suffix}"


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint or what is left of one, so that a reader never sees half of it.

    It loses its name first, then its manifest, then the rest.
    """
    hidden = path.with_name(hidden_name(path.name.lstrip(".").partition(".")[0], REMOVED))
    path.rename(hidden)
    (hidden / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(hidden)


def prunable(checkpoints: list[Path], keep_last: int, keep_every: int) -> list[Path]:
    """All of the valid `checkpoints` but the newest `keep_last` and every one whose step `keep_every` divides."""
    old = sorted(checkpoints, key=step_of)[: -max(keep_last, 1)]
    return [path for path in old if not (keep_every and step_of(path) % keep_every == 0)]


def prune_checkpoints(folder: Path, keep_last: int, keep_every: int, damaged: Collection[str] = ()) -> list[Path]:
    """Remove what is `prunable`; returns the removed.

    The `damaged` (names) neither count nor go: something of them might still be saved by hand.
    """
    removed = prunable([p for p in list_checkpoints(folder) if p.name not in damaged], keep_last, keep_every)
    for path in removed:
        with suppress(FileNotFoundError):
            remove_checkpoint(path)
    return removed


def remove_leftovers(folder: Path) -> None:
    """Clear away what a killed save or removal left behind; what a save had put aside gets its name back.

    An unfinished folder is renamed before it is deleted: whoever may still write it can no longer finish it.
    """
    for aside in folder.glob(f".step-*.{REPLACED}"):
        target = folder / aside.name[1:].partition(".")[0]
        if not target.exists():
            aside.rename(target)
    for suffix in (BEING_WRITTEN, REPLACED):
        for path in folder.glob(f".step-*.{suffix}"):
            with suppress(OSError):
                remove_checkpoint(path)
    for path in folder.glob(f".step-*.{REMOVED}"):
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- verifying


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint, a line for each file; nothing, if it is whole.

    Every file must have the manifest's size and sha256, none may be missing or foreign, and what is in them must fit
    together.
    """
    try:
        manifest = read_manifest(path)
        there = {file.name for file in path.iterdir()} - {MANIFEST}
    except (OSError, ValueError) as error:
        return [str(error)]
    problems = [f"{name} does not belong to it" for name in sorted(there - manifest.files.keys())]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: _damage(path / name, manifest.files[name]), manifest.files)
        problems += [f"{name} is {damage}" for name, damage in zip(manifest.files, found, strict=True) if damage]
    if problems:
        return problems
    try:
        SavedFragments(path).check()
        read_logits(path)
        if read_state(path).step != manifest.step:
            return [f"{STATE} is of another step"]
    except (OSError, ValueError) as error:
        return [str(error)]
    return []


def check_sizes(path: Path) -> list[str]:
    """As `verify_checkpoint`, but the files are not read: what a list of checkpoints can tell at once."""
    try:
        files = read_manifest(path).files
    except (OSError, ValueError) as error:
        return [str(error)]
    damaged = ((name, _damage(path / name, entry, read=False)) for name, entry in files.items())
    return [f"{name} is {damage}" for name, damage in damaged if damage]


def _damage(file: Path, entry: FileEntry, *, read: bool = True) -> str | None:
    try:
        if not file.is_file():
            return "missing"
        if file.stat().st_size != entry.bytes or (read and sha256_of(file) != entry.sha256):
            return "damaged"
    except OSError as error:
        return f"not readable ({error.strerror})"
    return None


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


def describe_damage(path: Path, problems: list[str]) -> str:
    """Problems that `verify_checkpoint` found, in a line."""
    shown = ", ".join(problems[:3]) + (", ..." if len(problems) > 3 else "")
    try:
        extent = f"{len(problems)} of {len(read_manifest(path).files) + 1} files ({shown})"
    except (OSError, ValueError):
        extent = shown
    return f"step {step_of(path)} is damaged: {extent}"


# ------------------------------------------------------------------------------------------------------ reading


def load_state(path: Path) -> TrainingState:
    """The training state of a verified checkpoint.

    Raises:
        UserError: there is none.
    """
    try:
        return read_state(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def newest_state(folder: Path) -> TrainingState | None:
    """The state of the newest checkpoint whose manifest and state.json are whole; its tensors are not looked at."""
    for path in reversed(list_checkpoints(folder)):
        with suppress(OSError, ValueError):
            if _damage(path / STATE, read_manifest(path).files[STATE]) is None:
                return read_state(path)
    return None


def load_weights(path: Path) -> dict[str, Tensor]:
    """Whole fp32 weights by parameter name, from a verified checkpoint.

    Raises:
        UserError: its files do not fit together.
    """
    try:
        saved = SavedFragments(path)
        saved.check()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    weights = {}
    for name, shape in saved.index.shapes.items():
        weights[name] = torch.empty(shape, dtype=torch.float32)
        saved.fill("weight", name, 0, weights[name].view(-1))
    return weights
