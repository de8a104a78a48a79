"""What a checkpoint is: its files, and how it is listed, verified, read and removed. Nothing here knows of ranks.

A checkpoint is a folder `step-00000100/` that exists completely or not at all:

    rank-00000.safetensors  the fragments that rank 0 held, each under the key "kind/parameter/start"
    logits.safetensors      a few tokens, and the logits that the model gave them when it was saved
    index.json              parameter shapes, and for every fragment its file and length
    state.json              step, tokens, the stream's state, and what they depend on
    MANIFEST.json           bytes and sha256 of each of these, and of itself

Nothing in it is a pickle. Whoever could write the folder could write the digests too, so what they cover is checked as
well before it is used: names, counts, ranges. Saving is in checkpoint_save.py, loading into an engine in
checkpoint_load.py.
"""

import hashlib
import json
import math
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, StringConstraints, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.data.stream import PER_STREAM, StreamState
from pretrain.errors import UserError
from pretrain.files import sha256_of

MANIFEST, INDEX, STATE, LOGITS = "MANIFEST.json", "index.json", "state.json", "logits.safetensors"
FORMAT = 2
MAX_JSON_BYTES = 256 * 2**20
"""A larger JSON file is not read: it would not be ours (a thousand ranks' index has about 75 MB)."""
BEING_WRITTEN, REPLACED, REMOVED = "tmp", "replaced", "removed"
"""Suffixes of hidden folders: what a save has not finished, what a save has put aside, what is being deleted."""

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""No separator and no dot in front, so that a name cannot lead out of the folder."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """What a file of a checkpoint must be."""

    bytes: NonNegativeInt
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Manifest(_Strict):
    """MANIFEST.json, without the digest of itself."""

    format: int
    step: NonNegativeInt
    files: dict[FileName, FileEntry]

    def sealed(self) -> bytes:
        """The bytes of the file, a digest of them included: any change of any byte shows."""
        plain = self.model_dump()
        digest = hashlib.sha256(json.dumps(plain, indent=1).encode()).hexdigest()
        return json.dumps({**plain, "sha256": digest}, indent=1).encode()


class Index(_Strict):
    """index.json: where each piece of each value lies."""

    format: int
    shapes: dict[str, list[PositiveInt]]
    fragments: dict[FileName, list[tuple[str, str, NonNegativeInt, PositiveInt]]]
    """File -> (kind, parameter, start, length) of each of its tensors."""

    @property
    def numel(self) -> dict[str, int]:
        """Elements of each parameter."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    def ranges(self) -> dict[tuple[str, str], list[tuple[int, int, str]]]:
        """(kind, parameter) -> [start, stop) and file of its pieces, ascending."""
        found: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
        for file, entries in self.fragments.items():
            for kind, parameter, start, length in entries:
                found[kind, parameter].append((start, start + length, file))
        return {key: sorted(pieces) for key, pieces in found.items()}


@dataclass(frozen=True)
class TrainingState:
    """What a run is at the end of a step, beside weights and moments; the same on every rank."""

    step: int
    """Optimizer steps, skipped ones included."""
    tokens_seen: int
    """Tokens, padding not counted."""
    optimizer_steps: int
    """Steps that the optimizer took."""
    stream: StreamState
    """Where the rows go on."""
    fingerprint: str
    """Of the corpus that the stream reads."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "stream": self.stream.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainingState":
        """The inverse of `to_json`.

        Raises:
            ValueError, KeyError, TypeError, OverflowError: `value` is not what `to_json` gives.
        """
        state = cls(**{**value, "stream": StreamState.from_json(value["stream"])})
        counts = (state.step, state.tokens_seen, state.optimizer_steps, state.stream.position, state.stream.positions)
        if not all(type(count) is int and 0 <= count < 2**62 for count in counts) or type(state.fingerprint) is not str:
            raise ValueError("a count is not a whole number from 0 on")
        per_stream = [getattr(state.stream, name) for name in PER_STREAM]
        if len({len(numbers) for numbers in per_stream}) != 1 or any((numbers < 0).any() for numbers in per_stream):
            raise ValueError("the streams' numbers do not fit together")
        return state


# ------------------------------------------------------------------------------------------------------- folders


def checkpoint_name(step: int) -> str:
    """Folder name, which sorts by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder name says."""
    return int(path.name.removeprefix("step-"))


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
        read_state(path)
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


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, of another format, or of another step than the folder's name.
    """
    try:
        content = _read_small(path / MANIFEST)
        value = json.loads(content)
        del value["sha256"]
        manifest = Manifest.model_validate_json(json.dumps(value))
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({_short(error)})") from error
    if manifest.sealed() != content:
        raise ValueError(f"{MANIFEST} is damaged")
    if manifest.format != FORMAT:
        raise ValueError(f"{MANIFEST} is of format {manifest.format}, and this version reads format {FORMAT}")
    if checkpoint_name(manifest.step) != path.name:
        raise ValueError(f"{MANIFEST} is of step {manifest.step}")
    if missing := {STATE, INDEX, LOGITS} - manifest.files.keys():
        raise ValueError(f"{MANIFEST} lacks {', '.join(sorted(missing))}")
    return manifest


def newest_valid_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    warnings: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problems = verify_checkpoint(path)
        if not problems:
            return path, warnings
        warnings.append(describe_damage(path, problems))
    return None, warnings


def describe_damage(path: Path, problems: list[str]) -> str:
    """Problems that `verify_checkpoint` found, in a line."""
    shown = ", ".join(problems[:3]) + (", ..." if len(problems) > 3 else "")
    try:
        extent = f"{len(problems)} of {len(read_manifest(path).files) + 1} files ({shown})"
    except (OSError, ValueError):
        extent = shown
    return f"step {step_of(path)} is damaged: {extent}"


# ------------------------------------------------------------------------------------------------------ reading


def read_state(path: Path) -> TrainingState:
    """The training state in a checkpoint.

    Raises:
        ValueError: it is not what a save writes.
    """
    try:
        return TrainingState.from_json(json.loads(_read_small(path / STATE)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{STATE} is not a training state ({_short(error)})") from error


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


class SavedFragments:
    """The ranges in a checkpoint's files, read where they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the index is not one."""
        try:
            self.index = Index.model_validate_json(_read_small(path / INDEX))
        except ValueError as error:
            raise ValueError(f"{INDEX} is not an index ({_short(error)})") from error
        self._path, self._ranges = path, self.index.ranges()
        self._files: dict[str, Any] = {}

    def check(self) -> None:
        """Return only if the index covers every value exactly once, and the files hold what it says.

        Raises:
            ValueError: naming what does not fit.
        """
        numel = self.index.numel
        for (kind, parameter), pieces in self._ranges.items():
            ends = [0, *(stop for _, stop, _ in pieces)]
            if ends[:-1] != [start for start, _, _ in pieces] or ends[-1] != numel.get(parameter):
                raise ValueError(f"{INDEX} does not cover {kind} of {parameter} exactly once")
        if missing := [name for name in numel if ("weight", name) not in self._ranges]:
            raise ValueError(f"{INDEX} has no weight of {missing[0]}")
        for name, entries in self.index.fragments.items():
            file = self._open(name)
            expected = {f"{kind}/{parameter}/{start}": [length] for kind, parameter, start, length in entries}
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            shapes = {key: piece.get_shape() for key, piece in slices.items()}
            if shapes != expected or any(piece.get_dtype() != "F32" for piece in slices.values()):
                raise ValueError(f"{name} does not hold what {INDEX} says")

    def fill(self, kind: str, parameter: str, start: int, target: Tensor) -> None:
        """Copy elements [start, start + len(target)) of a flattened parameter's value into `target`.

        Raises:
            ValueError: they are not all there.
        """
        stop, filled = start + target.numel(), 0
        for first, last, file in self._ranges.get((kind, parameter), ()):
            low, high = max(start, first), min(stop, last)
            if low < high:
                piece = self._open(file).get_slice(f"{kind}/{parameter}/{first}")[low - first : high - first]
                target[low - start : high - start].copy_(piece)
                filled += high - low
        if filled != target.numel():
            raise ValueError(f"the checkpoint covers {filled} of {target.numel()} elements of {kind} of {parameter}")

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self._path / name, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{name} is not a safetensors file ({_short(error)})") from error
        return self._files[name]


def _read_small(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_JSON_BYTES:,} bytes")
    return content


def _short(error: BaseException) -> str:
    """The first problem of an error, in a line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]
    return (str(error) or type(error).__name__).splitlines()[0][:200]
