"""What we ask Slurm: its partitions, the states of jobs, and to take, signal or end them. Decides nothing.

States come from `squeue`, and from `sacct` where the cluster keeps accounts; without accounts a job is forgotten some
minutes after its end, and what the run folder says of itself is all there is.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pretrain.config.cluster import time_seconds
from pretrain.errors import UserError

ANSWER_WITHIN_S = 20.0
"""A controller that is down makes Slurm's commands wait for minutes."""
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
RUNNING = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
)
NOTHING_SUBMITTED = (
    "nothing was submitted, try again when it is back, or run on this machine: `diptych train`, `diptych sweep --local`"
)


class SlurmSilentError(Exception):
    """Slurm's controller does not answer, or this machine has no Slurm."""


@dataclass(frozen=True)
class JobState:
    """A job (or a member of an array) as Slurm knows it."""

    state: str
    """Slurm's word: PENDING, RUNNING, COMPLETED, FAILED, NODE_FAIL, ..."""
    reason: str = ""
    """Why it waits, or why it ended; empty where Slurm says nothing."""
    comment: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it is in the queue and not on a node."""
        return self.state in WAITING

    @property
    def is_open(self) -> bool:
        """Whether it is in the queue or on nodes."""
        return self.state in WAITING or self.state in RUNNING

    @property
    def is_failed(self) -> bool:
        """Whether it is over without having come to its end."""
        return not self.is_open and self.state != "COMPLETED"


@dataclass(frozen=True)
class SlurmPartition:
    """A partition and its limits; None is unlimited."""

    name: str
    is_default: bool
    is_up: bool
    max_nodes: int | None
    max_time_s: int | None


def has_slurm() -> bool:
    """Whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def ask(command: Sequence[str], *, stdin: str | None = None) -> str:
    """What one of Slurm's commands prints.

    Raises:
        SlurmSilentError: there is no such command here, or no controller that answers.
        subprocess.CalledProcessError: it says no; `stderr` says why.
    """
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=ANSWER_WITHIN_S, check=False, errors="replace"
        )
    except FileNotFoundError as error:
        raise SlurmSilentError(f"there is no {command[0]} on this machine") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmSilentError(f"{command[0]} got no answer within {ANSWER_WITHIN_S:.0f} s") from error
    if done.returncode:
        if "configuration source" in done.stderr:
            raise SlurmSilentError("this machine has Slurm's commands, but belongs to no cluster that answers")
        if re.search(r"Unable to contact|Connection refused|Socket timed out", done.stderr):
            raise SlurmSilentError(f"Slurm's controller does not answer ({done.stderr.strip().splitlines()[-1]})")
        raise subprocess.CalledProcessError(done.returncode, list(command), done.stdout, done.stderr)
    return done.stdout


def job_states(job_ids: Collection[str]) -> dict[str, JobState]:
    """The states of those of the jobs that Slurm still knows; ids are 123, or 123_4 for a member of an array.

    Raises:
        SlurmSilentError: the controller does not answer.
    """
    if not job_ids:
        return {}
    known: dict[str, JobState] = {}
    # All of ours that it remembers: to ask for an id that is forgotten is an error, also for the others asked for.
    command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r|%k"]
    for line in ask(command).splitlines():
        job_id, state, reason, comment = line.split("|", 3)
        if job_id in job_ids:
            known[job_id] = JobState(state, _said(reason), _said(comment))
    if missing := set(job_ids) - known.keys():
        known |= _accounted(missing)
    return known


def _said(text: str) -> str:
    return "" if text.strip() in ("None", "(null)", "NonZeroExitCode") else text.strip()


def _accounted(job_ids: Collection[str]) -> dict[str, JobState]:
    """What the accounting database says, where there is one."""
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,Comment"]
    try:
        answer = ask([*command, f"--jobs={','.join(sorted(job_ids))}"])
    except (SlurmSilentError, subprocess.CalledProcessError):
        return {}
    found = {}
    for line in answer.splitlines():
        job_id, state, comment = line.split("|", 2)
        if job_id in job_ids:
            found[job_id] = JobState(state.split()[0], "", _said(comment))
    return found


def partitions() -> list[SlurmPartition]:
    """All partitions of the cluster."""
    found = []
    for line in ask(["scontrol", "--oneliner", "show", "partition"]).splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split())
        if "PartitionName" not in fields:
            continue
        limits = [fields.get("MaxNodes", ""), fields.get("TotalNodes", "")]
        numbers = [int(limit) for limit in limits if limit.isdigit()]
        time = fields.get("MaxTime", "UNLIMITED")
        found.append(
            SlurmPartition(
                name=fields["PartitionName"],
                is_default=fields.get("Default") == "YES",
                is_up=fields.get("State") == "UP",
                max_nodes=min(numbers) if numbers else None,
                max_time_s=None if time in ("UNLIMITED", "INFINITE", "NONE") else time_seconds(time),
            )
        )
    return found


def check_script(script: str) -> None:
    """Have Slurm itself check a script (account, constraint, memory, GPUs, ...), without queueing it.

    Raises:
        UserError: with Slurm's reason.
    """
    _sbatch(["--test-only"], script)


def submit_script(script: str, options: Sequence[str] = ()) -> str:
    """Queue a script; returns the job's id.

    Raises:
        UserError: with Slurm's reason.
    """
    return _sbatch(["--parsable", *options], script).strip().split(";")[0]


def _sbatch(options: Sequence[str], script: str) -> str:
    try:
        return ask(["sbatch", *options], stdin=script)
    except SlurmSilentError as error:
        raise UserError(f"{error}; {NOTHING_SUBMITTED}") from error
    except subprocess.CalledProcessError as error:
        reasons = [line for line in error.stderr.splitlines() if line.strip()]
        raise UserError(
            f"Slurm refuses the job: {'; '.join(reasons)}; change the cluster section or options"
        ) from error


def signal_job(job_id: str) -> None:
    """Ask all ranks of a running job to save and end."""
    ask(["scancel", "--signal=USR2", job_id])


def cancel_job(job_id: str) -> None:
    """Take a job out of the queue, or end it at once."""
    ask(["scancel", job_id])
