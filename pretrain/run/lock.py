"""The run lock: a second copy of a run refuses to start beside the first, on this machine and on any other.

The lock is a file beside the run folder. On one machine, the kernel's lock on it tells the truth, and ends with the
process that holds it. On another machine that lock may be unknown, or outlive its node; there the holder's heartbeat
counts: it touches the file every second, and who wants the lock watches for a few seconds whether it does. No clocks
are compared. So what a crash leaves behind delays the next start by these seconds at most.

It keeps out honest mistakes. What it lets through (a network that is cut for longer) is what `attempt.py` is for.
"""

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pretrain.errors import UserError
from pretrain.run.folder import RunFolder

BEAT_S = 1.0
OBSERVE_S = 5.0
"""How long a lock from another machine is watched for a sign of life; several beats."""


@dataclass(frozen=True)
class Holder:
    """Who holds a run."""

    machine: str
    host: str
    pid: int
    slurm_job: str | None
    slurm_restarts: int

    @classmethod
    def this_process(cls) -> "Holder":
        """The process at hand."""
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(machine_id(), os.uname().nodename, os.getpid(), os.environ.get("SLURM_JOB_ID"), restarts)

    def is_restart_of(self, other: "Holder") -> bool:
        """Whether Slurm says that this is the same job, started again: then the other one is over, or cut off."""
        same_job = self.slurm_job is not None and self.slurm_job == other.slurm_job
        return same_job and self.slurm_restarts > other.slurm_restarts


def machine_id() -> str:
    """Differs between machines and between boots of one; containers on a machine share it, and its kernel's locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


@contextmanager
def run_lock(run: RunFolder) -> Iterator[None]:
    """Hold the run, with a heartbeat from a thread, until the block ends.

    Raises:
        UserError: another process holds it, or the folder of runs cannot be written.
    """
    path = run.lock_file
    try:
        run.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
    except OSError as error:
        raise UserError(f"cannot write to {run.path.parent} ({error.strerror}); set runs=FOLDER") from error
    with file:
        _take_lock(file, run)
        ended = threading.Event()
        beat = threading.Thread(target=_beat, args=(path, ended), daemon=True, name="run lock heartbeat")
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            if _holder(file) == Holder.this_process():
                file.truncate(0)  # a clean end: the next start need not watch it


def holder_of(run: RunFolder) -> Holder | None:
    """Who has written itself into a run's lock, alive or not; None where the last one ended cleanly."""
    try:
        with run.lock_file.open("r") as file:
            return _holder(file)
    except OSError:
        return None


def is_locked(run: RunFolder) -> bool:
    """Whether some process holds the run; one on another machine is watched for up to `OBSERVE_S`."""
    path = run.lock_file
    try:
        with path.open("r+") as file:
            free = try_flock(file)
            fcntl.flock(file, fcntl.LOCK_UN)  # not kept while watching: somebody may want to start
            return _lock_is_held(file, path, Holder.this_process(), free)
    except OSError:
        return False


def _take_lock(file: IO[str], run: RunFolder) -> None:
    me = Holder.this_process()
    if _lock_is_held(file, run.lock_file, me, try_flock(file)):
        holder = _holder(file)
        by = f"process {holder.pid} on {holder.host}" if holder else "another process"
        if holder and holder.slurm_job:
            by += f" (Slurm job {holder.slurm_job})"
        raise UserError(
            f"{run} is being trained already, by {by}; wait for it, end it (it saves first), or choose another name=..."
        )
    file.seek(0)
    file.truncate()
    file.write(json.dumps(asdict(me)) + "\n")
    file.flush()
    os.fsync(file.fileno())


def try_flock(file: IO[str]) -> bool | None:
    """Take the kernel's lock. False: somebody has it; None: this file system has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lock_is_held(file: IO[str], path: Path, me: Holder, free: bool | None) -> bool:
    """What `free`, the kernel's word, means; watches the heartbeat where that says nothing."""
    holder = _holder(file)
    if holder is None:
        return free is False  # it has the lock and is about to write who it is
    if me.is_restart_of(holder):
        return False
    if holder.machine == me.machine and free is not None:
        return not free
    return _beats(path)


def _holder(file: IO[str]) -> Holder | None:
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def _beats(path: Path) -> bool:
    """Whether somebody touches the file within `OBSERVE_S`."""
    first, end = _touched_ns(path), time.monotonic() + OBSERVE_S
    while time.monotonic() < end:
        time.sleep(BEAT_S / 4)
        if _touched_ns(path) != first:
            return True
    return False


def _touched_ns(path: Path) -> int:
    # Opened, because a network file system asks its server for the time only then.
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(OSError):
            os.utime(path)
