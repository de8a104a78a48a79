"""One rank of this machine as a process: its command, its environment, its end."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.run.folder import RunFolder

TAIL_LINES = 15
SIGNAL_HINTS = {
    signal.SIGKILL: "out of memory (see `dmesg`; lower training.micro_batch_size), or someone killed it",
    signal.SIGBUS: "often a full /dev/shm (lower data.workers), or a failing disk under training.offload_folder",
}


def rank_command(run: RunFolder) -> list[str]:
    """The command of one rank. `-P`: a file in the working directory must not shadow a library's module."""
    return [sys.executable, "-P", "-m", "pretrain.training", str(run)]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def num_gpus() -> int:
    """GPUs that ranks on this machine may use; 0 under DS_ACCELERATOR=cpu. Without a driver, torch is not imported."""
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    present = any(Path(driver).exists() for driver in drivers) or shutil.which("nvidia-smi") is not None
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not present:
        return 0
    import torch

    return torch.cuda.device_count()


def rank_environment(rank: int, num_ranks: int, port: int, gpus: int, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of one rank: torch's rendezvous variables, threads, and the CPU's communication settings."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, num_cores() // num_ranks)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        **inherited,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DIPTYCH_LAUNCHER_PID": str(os.getpid()),
    }
    if gpus == 0:
        environment |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    home = str(Path(__file__).parents[2])
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [inherited.get("PYTHONPATH"), home]))
    return environment


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on.

    It lies below the ports that the system gives to whoever asks for any: rank 0 binds it seconds later, and until then
    a connection of another process could have taken it.
    """
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Rank:
    """One rank's process, and where this attempt begins in its log."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    exit_code: int | None = None

    def poll(self) -> bool:
        """True in the call that finds the rank ended; what it left running in its process group is killed then.

        The group is killed before its leader is reaped, while no other process can have its id.
        """
        if self.exit_code is not None:
            return False
        if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        os.killpg(self.process.pid, signal.SIGKILL)
        self.exit_code = self.process.wait()
        return True

    def terminate(self) -> None:
        """Ask it to finish its step, save and end."""
        if self.exit_code is None:
            # Not Popen.terminate: that would reap a rank that has just ended, before poll() has seen it.
            os.kill(self.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """End it and everything in its process group, now."""
        if self.exit_code is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.exit_code = self.process.wait()

    def log_tail(self, lines: int = TAIL_LINES) -> list[str]:
        """The last lines that it wrote in this attempt."""
        with self.log.open("rb") as file:
            file.seek(max(self.log_start, file.seek(0, os.SEEK_END) - 64_000))
            return [line.rstrip() for line in file.read().decode(errors="replace").splitlines()][-lines:]

    def how_it_ended(self) -> str:
        """Exit code or signal, in words."""
        assert self.exit_code is not None
        if self.exit_code >= 0:
            return f"ended with exit code {self.exit_code}"
        name = signal.Signals(-self.exit_code)
        hint = SIGNAL_HINTS.get(name)
        return f"was ended by {name.name}" + (f": {hint}" if hint else "")


def start_rank(command: Sequence[str], environment: dict[str, str], log: Path) -> Rank:
    """Start one rank in a session of its own, its output appended to `log`."""
    number = int(environment["RANK"])
    with log.open("ab") as file:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"--- {started}: rank {number} of {environment['WORLD_SIZE']} starts\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        return Rank(number, process, log, file.tell())
