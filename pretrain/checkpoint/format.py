"""The files of a checkpoint: what each of them holds, and how it is read without being trusted.

Whoever can write a checkpoint can write the digests too. So names, counts and ranges are checked against each other
and against the files' headers before anything is allocated or copied.
"""

import hashlib
import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, StringConstraints, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.data.stream.state import PER_STREAM, StreamState

MANIFEST, INDEX, STATE, LOGITS = "MANIFEST.json", "index.json", "state.json", "logits.safetensors"


FORMAT = 2


PRECISIONS = ("fp32", "bf16", "autocast")
"""Of logits: fp32; bf16 weights and activations; bf16 under autocast over fp32 weights."""


MAX_JSON_BYTES = 256 * 2**20
"""A larger JSON file is not read: it would not be ours (a thousand ranks' index has about 75 MB)."""


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


@dataclass(frozen=True)
class SavedLogits:
    """Tokens, their logits, and how these were computed."""

    input_ids: Tensor
    """int64 [1, P]."""
    logits: Tensor
    """float32 [M, vocabulary], of M of the positions."""
    precision: str
    """One of PRECISIONS."""
    rotary_theta: float | None
    """In place of every layer's own."""
    positions_dropped: bool

    @property
    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {"input_ids": self.input_ids, "logits": self.logits}

    @property
    def metadata(self) -> dict[str, str]:
        """For the same file."""
        theta = "" if self.rotary_theta is None else repr(self.rotary_theta)
        return {
            "precision": self.precision,
            "rotary_theta": theta,
            "positions_dropped": str(int(self.positions_dropped)),
        }


def checkpoint_name(step: int) -> str:
    """Folder name, which sorts by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder name says."""
    return int(path.name.removeprefix("step-"))


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


def read_state(path: Path) -> TrainingState:
    """The training state in a checkpoint.

    Raises:
        ValueError: it is not what a save writes.
    """
    try:
        return TrainingState.from_json(json.loads(_read_small(path / STATE)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{STATE} is not a training state ({_short(error)})") from error


def read_logits(path: Path) -> SavedLogits:
    """The logits in a checkpoint.

    Raises:
        ValueError: they are not what a save writes.
    """
    try:
        with safe_open(path / LOGITS, framework="pt") as file:
            metadata = file.metadata()
            input_ids, logits = (file.get_tensor(name) for name in ("input_ids", "logits"))
        theta = float(metadata["rotary_theta"]) if metadata["rotary_theta"] else None
        saved = SavedLogits(input_ids, logits, metadata["precision"], theta, metadata["positions_dropped"] == "1")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{LOGITS} does not hold logits ({_short(error)})") from error
    kinds = (input_ids.dtype, logits.dtype, input_ids.ndim, logits.ndim)
    if kinds != (torch.int64, torch.float32, 2, 2) or saved.precision not in PRECISIONS:
        raise ValueError(f"{LOGITS} does not hold logits")
    return saved


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
        if not numel:
            raise ValueError(f"{INDEX} has no parameters")
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

    @property
    def moments(self) -> dict[str, set[str]]:
        """The kinds of value beside the weight that there are of each parameter."""
        return {
            name: {kind for kind, other in self._ranges if other == name} - {"weight"} for name in self.index.shapes
        }

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
    if not path.is_file():  # nor a pipe, which would be waited for
        raise FileNotFoundError(f"{path.name} is missing")
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
