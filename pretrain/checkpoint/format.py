"""The JSON files of a checkpoint: what each of them holds, and how it is read without being trusted.

Whoever can write a checkpoint can write the digests too. So names, counts and ranges are checked against each other
(here) and against the headers of the tensors' files (tensors.py) before anything is allocated or copied. No torch here.
"""

import hashlib
import json
import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, StringConstraints, ValidationError

from pretrain.data.stream.state import PER_STREAM, StreamState

MANIFEST_FILE, INDEX_FILE, STATE_FILE, LOGITS_FILE = "MANIFEST.json", "index.json", "state.json", "logits.safetensors"
FORMAT = 2
MAX_JSON_BYTES = 256 * 2**20
"""A larger JSON file is not read: it would not be ours (a thousand ranks' index has about 75 MB)."""
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
"""A name that cannot lead out of the folder: it has no separator, and no dot in front."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """What a file of a checkpoint must be."""

    bytes: NonNegativeInt
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class CheckpointManifest(_Strict):
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
    """Place at which the rows go on."""
    fingerprint: str
    """Fingerprint of the corpus that the stream reads."""

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


def checkpoint_name(step: int) -> str:
    """Folder name, which sorts by step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder name says."""
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> CheckpointManifest:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, of another format, or of another step than the folder's name.
    """
    try:
        content = read_small(path / MANIFEST_FILE)
        value = json.loads(content)
        del value["sha256"]
        manifest = CheckpointManifest.model_validate_json(json.dumps(value))
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST_FILE} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST_FILE} is damaged ({brief(error)})") from error
    if manifest.sealed() != content:
        raise ValueError(f"{MANIFEST_FILE} is damaged")
    if manifest.format != FORMAT:
        raise ValueError(f"{MANIFEST_FILE} is of format {manifest.format}, and this version reads format {FORMAT}")
    if checkpoint_name(manifest.step) != path.name:
        raise ValueError(f"{MANIFEST_FILE} is of step {manifest.step}")
    if missing := {STATE_FILE, INDEX_FILE, LOGITS_FILE} - manifest.files.keys():
        raise ValueError(f"{MANIFEST_FILE} lacks {', '.join(sorted(missing))}")
    return manifest


def read_state(path: Path) -> TrainingState:
    """The training state in a checkpoint.

    Raises:
        ValueError: it is not what a save writes.
    """
    try:
        return TrainingState.from_json(json.loads(read_small(path / STATE_FILE)))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{STATE_FILE} is not a training state ({brief(error)})") from error


def read_small(path: Path) -> bytes:
    """The bytes of a JSON file of a checkpoint; raises ValueError where there are too many."""
    if not path.is_file():  # nor a pipe, which would be waited for
        raise FileNotFoundError(f"{path.name} is missing")
    with path.open("rb") as file:
        content = file.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_JSON_BYTES:,} bytes")
    return content


def brief(error: BaseException) -> str:
    """The first problem of an error, in a line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]
    return (str(error) or type(error).__name__).splitlines()[0][:200]
