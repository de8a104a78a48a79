"""Tensors in files: what a run with `training.offload: nvme` keeps on a disk of the node.

The files are mapped into memory, so that a tensor in one is a tensor like any other: the system reads what is touched,
writes what has changed, and keeps as much of it in memory as there is room for. They have no names, so that nothing is
left of them however the process ends.
"""

import mmap
import os
import shutil
import socket
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pretrain.errors import UserError


def zeros_in_file(like: Tensor, folder: Path) -> Tensor:
    """float32 zeros, shaped as `like`, in an unnamed file in `folder`, whose blocks are taken at once: no write fails.

    Raises:
        UserError: the folder is not there, cannot be written to, or has not so much room.
    """
    size = 4 * like.numel()
    if size == 0:
        return torch.zeros(like.shape)
    try:
        room = shutil.disk_usage(folder).free
        if size > room:
            raise UserError(
                f"{_place(folder)} has {room / 2**30:,.1f} GiB free, and a tensor of {size / 2**30:,.1f} GiB is to go "
                "there; `diptych plan` says how much every rank needs: make room, or choose another folder"
            )
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise UserError(f"{_place(folder)} cannot be used: {error.strerror}") from error
    return torch.frombuffer(mapped, dtype=torch.float32).view(like.shape)


def in_file(tensor: Tensor, folder: Path) -> Tensor:
    """A float32 tensor of the host's memory, copied into a file; see `zeros_in_file`."""
    return zeros_in_file(tensor, folder).copy_(tensor)


def _place(folder: Path) -> str:
    return f"training.offload_folder = {folder} on {socket.gethostname()}"
