"""Atomic, verified, rank- and stage-free checkpoints.

A checkpoint is a folder `step-00000100/` that exists completely or not at all:

    rank-00000.safetensors  the fragments that rank 0 held, each under the key "kind/parameter/start"
    index.json              parameter shapes, and for every fragment its file and length
    state.json              step, tokens, the stream's state, and what they depend on
    MANIFEST.json           bytes and sha256 of each of these

It is written under another name, flushed and renamed. Nothing in it is a pickle.
"""

import hashlib
import json
import secrets
import shutil
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pretrain.data.stream import StreamState
from pretrain.errors import UserError
from pretrain.files import fsync_path, sha256_of, write_json, write_text
from pretrain.training.engine import Engine, barrier
from pretrain.training.fragments import fragments, fragments_to_save

MANIFEST, INDEX, STATE = "MANIFEST.json", "index.json", "state.json"


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
        """The inverse of `to_json`."""
        return cls(**{**value, "stream": StreamState.from_json(value["stream"])})


def checkpoint_name(step: int) -> str:
    """Folder name, which sorts by step."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


# ------------------------------------------------------------------------------------------------------- save


def save_checkpoint(folder: Path, engine: Engine, state: TrainingState, own_streams: list[int]) -> Path:
    """Write a checkpoint from all ranks; collective. Returns its folder once it is complete.

    Args:
        folder: the run's `checkpoints/`.
        engine: whose weights and moments are saved.
        state: of this rank; its stream state is taken for `own_streams` and gathered for the others.
        own_streams: the streams that this rank reads.

    Raises:
        OSError: on every rank, if one could not write; earlier checkpoints are untouched.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    target = folder / checkpoint_name(state.step)
    temporary = folder / _broadcast(f".{target.name}.{secrets.token_hex(6)}.tmp")
    written: dict[str, Any] = {"error": None}
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        written |= _write_fragments(temporary / f"rank-{rank:05d}.safetensors", engine)
    except OSError as failure:
        written["error"] = f"rank {rank}: {failure}"
    written["stream"] = state.stream.of_streams(own_streams)
    parts = _gather(written, world_size)
    error: str | None = next((part["error"] for part in parts if part["error"]), None)
    if rank == 0:
        try:
            if error is None:
                _complete(temporary, target, engine, state, parts)
        except OSError as failure:
            error = f"rank 0: {failure}"
        if error is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    if error := _broadcast(error):
        raise OSError(f"checkpoint {target.name} could not be written ({error}); earlier ones are intact")
    return target


def _write_fragments(path: Path, engine: Engine) -> dict[str, Any]:
    """Write this rank's fragments; returns their index entries and the file's manifest entry."""
    tensors, entries = {}, []
    for fragment in fragments_to_save(engine):
        key = f"{fragment.kind}/{fragment.parameter}/{fragment.start}"
        tensors[key] = fragment.tensor.cpu().clone()
        entries.append([fragment.kind, fragment.parameter, fragment.start, fragment.tensor.numel(), path.name])
    save_file(tensors, path)
    fsync_path(path)
    return {"entries": entries, "files": {path.name: _file_entry(path)}}


def _file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _complete(temporary: Path, target: Path, engine: Engine, state: TrainingState, parts: list[dict[str, Any]]) -> None:
    """Rank 0: write what all ranks share, then let the folder appear under its name."""
    stream = state.stream.merged(part["stream"] for part in parts)
    write_json(temporary / STATE, replace(state, stream=stream).to_json())
    entries = [entry for part in parts for entry in part["entries"]]
    write_json(temporary / INDEX, {"format": 1, "shapes": engine.parameter_shapes, "fragments": entries})
    files = {name: entry for part in parts for name, entry in part["files"].items()}
    files |= {name: _file_entry(temporary / name) for name in (STATE, INDEX)}
    write_text(temporary / MANIFEST, _sealed({"format": 1, "step": state.step, "files": files}))
    if target.exists():
        remove_checkpoint(target)
    temporary.rename(target)
    fsync_path(target.parent)


def _sealed(manifest: dict[str, Any]) -> str:
    """The text of a MANIFEST.json, its own sha256 included: any change of any byte of it shows."""
    text = json.dumps(manifest, indent=1)
    return json.dumps({**manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}, indent=1)


def remove_checkpoint(path: Path) -> None:
    """Delete a checkpoint; its manifest goes first, so that what is left of it never counts as one."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def prune_checkpoints(folder: Path, keep_last: int, keep_every: int) -> list[Path]:
    """Remove all but the newest `keep_last` and every one whose step `keep_every` divides; returns the removed."""
    removed = []
    for path in list_checkpoints(folder)[:-keep_last]:
        step = int(path.name.removeprefix("step-"))
        if not (keep_every and step % keep_every == 0):
            remove_checkpoint(path)
            removed.append(path)
    return removed


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed save left behind.

    Renamed first: an older attempt that still works on it then finds it gone, and cannot commit what is left of it.
    """
    for path in folder.glob(".step-*.tmp"):
        doomed = path.with_name(f".{secrets.token_hex(6)}.doomed")
        with suppress(FileNotFoundError):
            path.rename(doomed)
    for path in folder.glob(".*.doomed"):
        shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- load


def verify_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint: every file must have the manifest's size and sha256, and none may be foreign."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        manifest.pop("sha256")
        if _sealed(manifest) != text:
            return [f"{MANIFEST} is damaged"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} is not readable: {error!r}"]
    files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    problems = [] if checkpoint_name(manifest["step"]) == path.name else [f"it is of step {manifest['step']}"]
    for name, (size, digest) in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size or sha256_of(file) != digest:
            problems.append(f"{name} is damaged")
    return problems


def newest_valid_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not."""
    warnings: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problems = verify_checkpoint(path)
        if not problems:
            return path, warnings
        warnings.append(f"checkpoint {path.name} is damaged ({'; '.join(problems)}); it is left out")
    return None, warnings


def agree_on_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """`newest_valid_checkpoint` as rank 0 sees it, on every rank; collective."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    path, warnings = newest_valid_checkpoint(folder) if rank == 0 else (None, [])
    name, warnings = _broadcast((path.name if path else None, warnings))
    return (folder / name if name else None), warnings


def load_state(path: Path) -> TrainingState:
    """The training state of a verified checkpoint."""
    return TrainingState.from_json(json.loads((path / STATE).read_bytes()))


def load_checkpoint(path: Path, engine: Engine) -> TrainingState:
    """Continue from a verified checkpoint, whatever ranks and stage wrote it; collective.

    Raises:
        UserError: it holds a model of another shape.
    """
    index = json.loads((path / INDEX).read_bytes())
    shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
    if shapes != engine.parameter_shapes:
        name = next(n for n in {**shapes, **engine.parameter_shapes} if shapes.get(n) != engine.parameter_shapes.get(n))
        raise UserError(
            f"{path} holds another model: {name} is {shapes.get(name, 'absent')} there and "
            f"{engine.parameter_shapes.get(name, 'absent')} in the config"
        )
    saved = _SavedFragments(path, index["fragments"])
    for fragment in fragments(engine):
        saved.fill(fragment.kind, fragment.parameter, fragment.start, fragment.tensor)
    state = load_state(path)
    engine.set_optimizer_steps(state.optimizer_steps)
    engine.refresh_weights()
    barrier()
    return state


def load_weights(path: Path) -> dict[str, Tensor]:
    """Whole fp32 weights by parameter name, from a verified checkpoint."""
    index = json.loads((path / INDEX).read_bytes())
    saved = _SavedFragments(path, index["fragments"])
    weights = {}
    for name, shape in index["shapes"].items():
        weights[name] = torch.empty(shape, dtype=torch.float32)
        saved.fill("weight", name, 0, weights[name].view(-1))
    return weights


class _SavedFragments:
    """The ranges in a checkpoint's files, read where they are asked for."""

    def __init__(self, path: Path, entries: list[Any]) -> None:
        self._ranges: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
        for kind, parameter, start, length, file in entries:
            self._ranges[kind, parameter].append((start, start + length, file))
        self._files = {file: safe_open(path / file, framework="pt") for file in {entry[-1] for entry in entries}}

    def fill(self, kind: str, parameter: str, start: int, target: Tensor) -> None:
        """Copy elements [start, start + len(target)) of a flattened parameter's value into `target`."""
        stop, filled = start + target.numel(), 0
        for first, last, file in self._ranges[kind, parameter]:
            low, high = max(start, first), min(stop, last)
            if low < high:
                piece = self._files[file].get_slice(f"{kind}/{parameter}/{first}")[low - first : high - first]
                target[low - start : high - start].copy_(piece)
                filled += high - low
        if filled != target.numel():
            raise ValueError(f"the checkpoint covers {filled} of {target.numel()} elements of {kind} of {parameter}")


def _broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def _gather(value: Any, world_size: int) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values
