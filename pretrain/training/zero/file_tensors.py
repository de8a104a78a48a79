"""Tensors in files: what a run with `training.offload: nvme` keeps on a disk of the node.

The files are mapped into memory, so that a tensor in one is a tensor like any other: the system reads what is touched,
writes what has changed, and keeps as much of it in memory as there is room for. They have no names, so that nothing is
left of them however the process ends.
"""

import logging
import mmap
import os
import shutil
import socket
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pretrain.errors import UserError

log = logging.getLogger(__name__)
IN_MEMORY = {"tmpfs", "ramfs"}


class TensorFiles:
    """Tensors of one rank, in files of one folder."""

    def __init__(self, folder: str) -> None:
        """`folder` may name variables of the environment, as this node has them: `$TMPDIR`.

        Raises:
            UserError: one is not set.
        """
        self.folder = Path(os.path.expandvars(folder)).expanduser().absolute()
        self._place = f"training.offload_folder = {self.folder} on {socket.gethostname()}"
        self._maps: list[mmap.mmap] = []
        if "$" in str(self.folder):
            raise UserError(f"{self._place} names a variable that is not set there")
        if filesystem_of(self.folder) in IN_MEMORY:
            log.warning("%s is itself in memory (tmpfs): nothing is gained; choose a folder on a disk", self._place)

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """float32 zeros of this shape in a file, whose blocks are taken at once: no later write finds the disk full.

        Raises:
            UserError: the folder is not there, cannot be written to, or has not so much room.
        """
        size = 4 * tensor.numel()
        if size == 0:
            return torch.zeros(tensor.shape)
        try:
            room = shutil.disk_usage(self.folder).free
            if size > room:
                raise UserError(
                    f"{self._place} has {room / 2**30:,.1f} GiB free, and a tensor of {size / 2**30:,.1f} GiB is to go "
                    "there; `diptych plan` says how much every rank needs: make room, or choose another folder"
                )
            with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                self._maps.append(mmap.mmap(file.fileno(), size))
        except OSError as error:
            raise UserError(f"{self._place} cannot be used: {error.strerror}") from error
        return torch.frombuffer(self._maps[-1], dtype=torch.float32).view(tensor.shape)

    def copy_of(self, tensor: Tensor) -> Tensor:
        """A float32 tensor of the host's memory, in a file; see `zeros_like`."""
        return self.zeros_like(tensor).copy_(tensor)

    def flush(self) -> None:
        """Write what has changed; a disk that failed to take an earlier value tells it only here.

        Raises:
            OSError: it did, so that the tensors may hold old values.
        """
        for mapped in self._maps:
            try:
                mapped.flush()
            except OSError as error:
                message = f"{self._place} failed to keep values, which are lost: {error.strerror}; choose another disk"
                raise OSError(error.errno, message) from error


def filesystem_of(folder: Path) -> str | None:
    """The kind that a folder lies on; None where the system does not tell."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    above = {str(folder.resolve()), *map(str, folder.resolve().parents)}
    kinds = {place: kind for place, kind in mounts if place in above}
    return kinds[max(kinds, key=len)] if kinds else None
