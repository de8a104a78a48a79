"""What a rank does as a process: its signals, its parent, its place among the ranks.

What takes long is imported late, so that a signal in the first second of a rank already finds its handler.
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pretrain.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    import torch

    from pretrain.run.attempt import Attempt
    from pretrain.run.folder import RunFolder

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1
_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface, by its name."""


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


def end_rank(code: int) -> NoReturn:
    """Leave this process, without waiting for threads of libraries.

    A rank that has failed must not linger beside the others. And where a thread of gloo still frees a tensor while the
    interpreter ends, torch 2.13 aborts the process, however well it went.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


@dataclass(frozen=True)
class Ranks:
    """All ranks of a run, as one of them sees them."""

    rank: int
    """Number of this rank, from 0."""
    world_size: int
    """Number of ranks."""
    device: "torch.device"
    """Device that this rank computes on."""

    @property
    def device_name(self) -> str:
        """Name of the GPU; `cpu` without one."""
        import torch

        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"


def join_ranks(timeout_s: float) -> Ranks:
    """Meet the other ranks, by the variables that torchrun, Slurm scripts and our own launcher set.

    What waits for another rank for longer than `timeout_s` fails: here, and in every collective.
    """
    import torch
    import torch.distributed as dist

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world_size))
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
    master = os.environ.get("MASTER_ADDR")
    if master and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_towards(master)
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    return Ranks(rank, world_size, torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"))


def interface_towards(host: str) -> str | None:
    """The name of the interface through which `host` is reached; None where that is not known.

    gloo by itself takes the interface of this host's own name, which many systems set to a loopback address: then the
    ranks of other hosts cannot be reached.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 1))  # a datagram socket: nothing is sent
        except OSError:
            return None
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


@contextmanager
def hold_run(run: "RunFolder", rank: int) -> Iterator["Attempt"]:
    """Hold the run: where no launcher of ours has locked it (torchrun, Slurm), rank 0 does, and takes the attempt.

    From then on each rank's output goes to the attempt's log in the run folder; what comes before is where the ranks
    were started from. Collective.

    Raises:
        UserError: on every rank, if the run is being trained already.
    """
    from pretrain.run.attempt import ATTEMPT_VARIABLE, agree_on_attempt

    if ATTEMPT_VARIABLE in os.environ:
        yield agree_on_attempt(run)
        return
    import torch.distributed as dist

    from pretrain.run.lock import run_lock

    with ExitStack() as held:
        problem: list[str | None] = [None]
        if rank == 0:
            try:
                held.enter_context(run_lock(run))
            except UserError as error:
                problem = [str(error)]
        dist.broadcast_object_list(problem, src=0)
        if problem[0] is not None:
            raise UserError(problem[0])
        attempt = agree_on_attempt(run)
        os.environ[ATTEMPT_VARIABLE] = str(attempt.number)
        _send_output_to(attempt.log(rank))
        yield attempt


def _send_output_to(log: Path) -> None:
    print(f"this rank's log: {log}", file=sys.stderr, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        sys.stdout.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
