"""The folder of a run's checkpoints: listed, pruned, cleared of leftovers, without reading a tensor. Needs no torch."""

import re
import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from pretrain.checkpoint.format import (
    MANIFEST_FILE,
    STATE_FILE,
    FileEntry,
    TrainingState,
    read_manifest,
    read_state,
    step_of,
)
from pretrain.errors import UserError
from pretrain.files import sha256_of

BEING_WRITTEN, PUT_ASIDE, BEING_REMOVED = "tmp", "replaced", "removed"
"""Suffixes of hidden folders: what a save has not finished, what a save has put aside, what is being deleted."""


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
    hidden = path.with_name(hidden_name(path.name.lstrip(".").partition(".")[0], BEING_REMOVED))
    path.rename(hidden)
    (hidden / MANIFEST_FILE).unlink(missing_ok=True)
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
    for aside in folder.glob(f".step-*.{PUT_ASIDE}"):
        target = folder / aside.name[1:].partition(".")[0]
        if not target.exists():
            aside.rename(target)
    for suffix in (BEING_WRITTEN, PUT_ASIDE):
        for path in folder.glob(f".step-*.{suffix}"):
            with suppress(OSError):
                remove_checkpoint(path)
    for path in folder.glob(f".step-*.{BEING_REMOVED}"):
        shutil.rmtree(path, ignore_errors=True)


def check_sizes(path: Path) -> list[str]:
    """Damage that shows without reading the files, a line for each: what a list of checkpoints can tell at once."""
    try:
        files = read_manifest(path).files
    except (OSError, ValueError) as error:
        return [str(error)]
    damaged = ((name, damage_of(path / name, entry, read=False)) for name, entry in files.items())
    return [f"{name} is {damage}" for name, damage in damaged if damage]


def damage_of(file: Path, entry: FileEntry, *, read: bool = True) -> str | None:
    """What is wrong with a file, as far as can be told with or without reading it."""
    try:
        if not file.is_file():
            return "missing"
        if file.stat().st_size != entry.bytes or (read and sha256_of(file) != entry.sha256):
            return "damaged"
    except OSError as error:
        return f"not readable ({error.strerror})"
    return None


def describe_damage(path: Path, problems: list[str]) -> str:
    """Problems that `verify_checkpoint` found, in a line."""
    shown = ", ".join(problems[:3]) + (", ..." if len(problems) > 3 else "")
    try:
        extent = f"{len(problems)} of {len(read_manifest(path).files) + 1} files ({shown})"
    except (OSError, ValueError):
        extent = shown
    return f"step {step_of(path)} is damaged: {extent}"


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
            if damage_of(path / STATE_FILE, read_manifest(path).files[STATE_FILE]) is None:
                return read_state(path)
    return None
