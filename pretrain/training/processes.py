"""What a rank does as a process: its signals, its parent, its place among the ranks.

torch is imported late, so that a signal in the first second of a rank already finds its handler.
"""

import ctypes
import os
import signal
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from pretrain.errors import EXIT_FAILED

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Have the kernel kill this process when its launcher dies, however that dies (Linux only)."""
    launcher = os.environ.get("DIPTYCH_LAUNCHER_PID")
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):
        os._exit(EXIT_FAILED)


class StopRequest:
    """Remembers that a stop was asked for. The handler sets a flag and nothing else: ranks act on it together."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: object) -> None:
        self.signal_name = signal.Signals(number).name

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal_name is not None


def join_ranks() -> tuple[int, int, "torch.device"]:
    """Meet the other ranks, by the variables that torchrun, Slurm scripts and our own launcher set.

    Returns:
        Rank, world size, and the device of this rank.
    """
    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world_size))
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(minutes=30))
    return rank, world_size, torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
