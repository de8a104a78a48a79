"""The tensors of a checkpoint, read where they are asked for and without being trusted."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain.checkpoint.format import INDEX_FILE, Index, brief, read_small
from pretrain.errors import UserError


class SavedFragments:
    """The ranges in a checkpoint's files, read where they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the index is not one."""
        try:
            self.index = Index.model_validate_json(read_small(path / INDEX_FILE))
        except ValueError as error:
            raise ValueError(f"{INDEX_FILE} is not an index ({brief(error)})") from error
        self._path, self._ranges = path, self.index.ranges()
        self._files: dict[str, Any] = {}

    def check(self) -> None:
        """Return only if the index covers every value exactly once, and the files hold what it says.

        Raises:
            ValueError: naming what does not fit.
        """
        numel = self.index.numel
        if not numel:
            raise ValueError(f"{INDEX_FILE} has no parameters")
        for (kind, parameter), pieces in self._ranges.items():
            ends = [0, *(stop for _, stop, _ in pieces)]
            if ends[:-1] != [start for start, _, _ in pieces] or ends[-1] != numel.get(parameter):
                raise ValueError(f"{INDEX_FILE} does not cover {kind} of {parameter} exactly once")
        if missing := [name for name in numel if ("weight", name) not in self._ranges]:
            raise ValueError(f"{INDEX_FILE} has no weight of {missing[0]}")
        for name, entries in self.index.fragments.items():
            file = self._open(name)
            expected = {f"{kind}/{parameter}/{start}": [length] for kind, parameter, start, length in entries}
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            shapes = {key: piece.get_shape() for key, piece in slices.items()}
            if shapes != expected or any(piece.get_dtype() != "F32" for piece in slices.values()):
                raise ValueError(f"{name} does not hold what {INDEX_FILE} says")

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
                raise ValueError(f"{name} is not a safetensors file ({brief(error)})") from error
        return self._files[name]


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
