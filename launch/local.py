"""Our own supervision of the ranks of one machine: start them, watch them, end them together.

Each rank is a process group of its own, so the terminal's Ctrl-C reaches only the launcher, which forwards it as
SIGTERM. A rank asks the kernel to kill it (SIGKILL) when the launcher dies: a rank without its supervisor could hang
in a collective for ever, or write to the run folder beside the launch that follows; checkpoints survive a SIGKILL.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.display import Display
from pretrain.config import RunConfig
from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUME_ME, EXIT_SUPERSEDED, EXIT_WRONG_INPUT
from pretrain.status import LIVE_STATES, STATUS, read_status
from pretrain.training.attempt import VARIABLE, Attempt, take_attempt
from pretrain.training.watchdog import end_of

POLL_S = 0.1
FAILURE_GRACE_S = 4.0
"""How long the other ranks may take to end when one has died: they are likely stuck in a collective with it."""
SAVE_GRACE_S = 300.0
"""How long the ranks may take to finish their step and save."""
REPEAT_S = 0.5
"""Two SIGINTs closer than this are one Ctrl-C, which a wrapper forwarded a second time."""
TAIL_LINES = 15
TELLING = (EXIT_SUPERSEDED, EXIT_WRONG_INPUT)
"""Exit codes of a rank that say why the launch ends, whatever the other ranks say."""

SIGNAL_HINTS = {
    signal.SIGKILL: "out of memory (see `dmesg`; lower training.micro_batch_size), or someone killed it",
    signal.SIGBUS: "often a full /dev/shm (lower data.workers), or a failing disk under training.offload_folder",
}


def rank_command(run_folder: Path) -> list[str]:
    """The command of one rank. `-P`: a file in the working directory must not shadow a library's module."""
    return [sys.executable, "-P", "-m", "pretrain.training", str(run_folder)]


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
    home = str(Path(__file__).parent.parent)
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [inherited.get("PYTHONPATH"), home]))
    return environment


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


class StopRequests:
    """The signals that ask the launch to end: how many, and whether it is to be at once."""

    def __init__(self) -> None:
        self.requested = False
        self.at_once = False
        self._first_at = 0.0

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler: only sets flags."""
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first_at = True, now
        elif number == signal.SIGINT and now - self._first_at > REPEAT_S:
            self.at_once = True


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Take the signals that mean "end": SIGINT, SIGTERM, SIGUSR1, SIGUSR2, and SIGHUP unless under nohup."""
    requests = StopRequests()
    taken = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        taken.append(signal.SIGHUP)
    before = {number: signal.signal(number, requests.receive) for number in taken}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Supervisor:
    """Watches ranks until all have ended, and decides what their end means."""

    def __init__(
        self, ranks: Sequence[Rank], requests: StopRequests, display: Display, attempt: Attempt | None = None
    ) -> None:
        """`attempt` is the one that the ranks' watchdogs may end; None for ranks that have none."""
        self._ranks, self._requests, self._display, self._attempt = ranks, requests, display, attempt
        self._deadline = float("inf")
        self._stopping = False
        self._killed = False
        self.failed: list[Rank] = []
        """Ranks that ended in error by themselves, the first to be blamed first."""

    def watch(self, refresh: Callable[[], None]) -> int:
        """Return the launch's exit code when no rank is running any more; `refresh` is called between looks."""
        while any(rank.exit_code is None for rank in self._ranks):
            self._look_at_ranks()
            self._look_at_requests()
            if time.monotonic() > self._deadline:
                self._kill()
            refresh()
            time.sleep(POLL_S)
        return self._exit_code()

    def _look_at_ranks(self) -> None:
        ended = [rank for rank in self._ranks if rank.poll()]
        if not ended:
            return
        expected = {EXIT_DONE, EXIT_RESUME_ME, *([-signal.SIGTERM] if self._stopping else [])}
        wrong = [rank for rank in ended if rank.exit_code not in expected]
        if wrong and not self.failed and not self._killed:
            self.failed = sorted(wrong, key=lambda rank: (rank.exit_code not in TELLING, rank.exit_code or 0))
            self._end_within(FAILURE_GRACE_S)
            for rank in self._ranks:
                rank.terminate()
        elif any(rank.exit_code == -signal.SIGTERM for rank in ended):
            # It ended before it could handle the signal, so there is nothing to save and the others wait in vain.
            self._end_within(FAILURE_GRACE_S)
        elif self._ended_by_watchdog():
            # By the watchdog, because of a rank that will not end by itself.
            self._end_within(FAILURE_GRACE_S)
        else:
            self._end_within(SAVE_GRACE_S)

    def _look_at_requests(self) -> None:
        if self._requests.at_once and not self._killed:
            self._display.message("stopping at once; the steps since the last checkpoint are lost", "yellow")
            self._kill()
        elif self._requests.requested and not self._stopping:
            self._stopping = True
            self._display.message("finishing the step and saving; press Ctrl-C again to stop at once", "yellow")
            self._end_within(SAVE_GRACE_S)
            for rank in self._ranks:
                rank.terminate()

    def _end_within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _kill(self) -> None:
        late = [rank for rank in self._ranks if rank.exit_code is None]
        if late and not self.failed and not self._requests.at_once and not self._ended_early():
            names = ", ".join(str(rank.number) for rank in late)
            self._display.message(f"killed rank {names}: it did not end in time", "yellow")
        self._killed = True
        for rank in late:
            rank.kill()

    def _ended_early(self) -> bool:
        return self._stopping and any(rank.exit_code == -signal.SIGTERM for rank in self._ranks)

    def _ended_by_watchdog(self) -> bool:
        return self._attempt is not None and end_of(self._attempt) is not None

    def _exit_code(self) -> int:
        codes = {rank.exit_code for rank in self._ranks}
        if self.failed:
            wrong_input = any(rank.exit_code == EXIT_WRONG_INPUT for rank in self.failed)
            return EXIT_WRONG_INPUT if wrong_input else EXIT_FAILED
        if codes == {EXIT_DONE}:
            return EXIT_DONE
        if self._ended_by_watchdog() and not self._requests.at_once:
            return EXIT_RESUME_ME
        if self._requests.at_once or (self._killed and not self._ended_early()):
            return EXIT_FAILED
        return EXIT_RESUME_ME


class StatusFeed:
    """Passes what rank 0 writes to status.json on to the display: each event once, nothing of an earlier attempt."""

    def __init__(self, attempt: Attempt, display: Display) -> None:
        self._attempt, self._display = attempt, display
        self._modified_ns = 0
        self._events = 0

    def refresh(self) -> None:
        """Show what is new since the last call."""
        try:
            modified_ns = (self._attempt.run_folder / STATUS).stat().st_mtime_ns
        except OSError:
            return
        if modified_ns == self._modified_ns:
            return
        self._modified_ns = modified_ns
        status = read_status(self._attempt.run_folder)
        if status is None or status.attempt != self._attempt.number:
            return
        for event in status.events[max(self._events - status.events_before, 0) :]:
            self._display.message(event)
        self._events = max(self._events, status.events_before + len(status.events))
        self._display.update(status)


def launch_local(
    config: RunConfig, num_ranks: int, display: Display, environment: Mapping[str, str] | None = None
) -> int:
    """Train on `num_ranks` processes of this machine; must be called from the main thread.

    `environment` holds variables for the ranks, besides those of this process.

    Returns:
        0: the run is done; 75: it was asked to stop, has saved and can be resumed; 2: a rank found the user's input
        wrong; 1: anything else. No rank is left running in any case.
    """
    from pretrain.training.run_folder import CORPUS_URL

    run_folder = config.run_folder
    attempt = take_attempt(run_folder)
    attempt.log(0).parent.mkdir(parents=True, exist_ok=True)
    port, gpus = free_port(), num_gpus()
    ranks: list[Rank] = []
    with stop_requests() as requests, display:
        feed = StatusFeed(attempt, display)
        try:
            for number in range(num_ranks):
                variables = rank_environment(number, num_ranks, port, gpus, {**os.environ, **(environment or {})})
                variables[VARIABLE] = str(attempt.number)
                if config.corpus.url:
                    variables[CORPUS_URL] = config.corpus.url
                ranks.append(start_rank(rank_command(run_folder), variables, attempt.log(number)))
            supervisor = Supervisor(ranks, requests, display, attempt)
            exit_code = supervisor.watch(feed.refresh)
        finally:
            for rank in ranks:
                rank.kill()
        feed.refresh()
    for rank in supervisor.failed[:1]:
        display.message(f"rank {rank.number} {rank.how_it_ended()}; its last lines:", "bold red")
        for line in rank.log_tail():
            display.message(f"  {line}")
        display.message(f"the whole log: {rank.log}")
    _close_status(attempt, exit_code, supervisor.failed)
    if exit_code == EXIT_RESUME_ME:
        status = read_status(run_folder)
        where = f" from {status.checkpoint}" if status and status.checkpoint else ""
        display.message(f"interrupted; run the same command again to resume{where}")
    return exit_code


def _close_status(attempt: Attempt, exit_code: int, failed: Sequence[Rank]) -> None:
    """Where the ranks had no time to say that they end, say it for them."""
    status = read_status(attempt.run_folder)
    if status is None or status.state not in LIVE_STATES or exit_code == EXIT_DONE or attempt.superseded_by():
        return
    status.state = "interrupted" if exit_code == EXIT_RESUME_ME or not failed else "failed"
    status.message = end_of(attempt)
    if failed:
        status.message = f"rank {failed[0].number} {failed[0].how_it_ended()}"
    status.write(attempt.run_folder)
