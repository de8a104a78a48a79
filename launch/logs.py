"""`diptych logs`: what the ranks of a run print, wherever they run; also across restarts."""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.slurm.starts import read_starts
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.status import LIVE_STATES

FOLLOW_POLL_S = 0.5
QUIET_S = 3.0
"""A run that has ended is followed until its log has been quiet for so long."""
NAMED = "this rank's log: "


def log_of(run: RunFolder, rank: int) -> Path | None:
    """Log of a rank of the newest start; None where nothing was started yet.

    Under Slurm a rank writes into the submission's folder until it has met the others, and names its log there.
    """
    name = f"rank-{rank:04d}.log"
    attempts = run.logs_of(rank)
    early = sorted(run.submissions.glob(f"*/job-*-start-*/{name}"), key=_modified)
    jobs = sorted(run.submissions.glob("*/job-*.out"), key=_modified)
    if early and not (attempts and _names(early[-1], attempts[-1])):
        newest_attempt = _modified(attempts[-1]) if attempts else 0.0
        if _modified(early[-1]) >= newest_attempt:
            return early[-1]
    if attempts:
        return attempts[-1]
    return jobs[-1] if jobs and rank == 0 else None


def _modified(path: Path) -> float:
    return path.stat().st_mtime


def _names(early: Path, log: Path) -> bool:
    return f"{NAMED}{log}" in early.read_text(errors="replace")


def show_log(run: RunFolder, rank: int, follow: bool, write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print a rank's newest log; with `follow` go on until the run has ended, into the logs of later starts too.

    Raises:
        UserError: there is no such log.
    """
    log = log_of(run, rank)
    if log is None and not follow:
        there = sorted({path.stem for path in run.logs_of()})
        hint = f"there are {', '.join(there)}" if there else "nothing was started yet"
        raise UserError(f"{run} has no log of rank {rank}; {hint}")
    shown: Path | None = None
    position, quiet_since = 0, time.monotonic()
    while True:
        log = log_of(run, rank)
        if log != shown and log is not None:
            if shown is not None:
                write(f"--- {log}\n")
            shown, position = log, 0
        text = _read_from(shown, position) if shown else b""
        if text:
            position += len(text)
            write(text.decode(errors="replace"))
            sys.stdout.flush()
            quiet_since = time.monotonic()
            continue
        if not follow or (_has_ended(run) and time.monotonic() - quiet_since > QUIET_S):
            return
        time.sleep(FOLLOW_POLL_S)


def _has_ended(run: RunFolder) -> bool:
    """Whether nobody is at work, and nobody will be unless somebody starts the run again."""
    status, starts = run.status(), read_starts(run)
    if status is not None and status.state in LIVE_STATES:
        return False
    return not starts[-1].goes_on if starts else status is not None


def _read_from(log: Path, position: int) -> bytes:
    try:
        with log.open("rb") as file:
            file.seek(position)
            return file.read(2**20)
    except OSError:
        return b""
