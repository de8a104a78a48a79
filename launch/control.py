"""`diptych cancel` and `diptych resume`: for runs on this machine and on Slurm alike."""

import os
import signal
from collections.abc import Sequence

from rich.console import Console

from launch.local.ranks import num_gpus
from launch.pipeline import choose_num_ranks, train_and_evaluate
from launch.slurm.queries import SlurmSilentError, cancel_job, has_slurm, job_states, signal_job
from launch.slurm.queueing import queue_run
from launch.slurm.submission import newest_submission
from launch.terminal.console import say
from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.lock import holder_of, is_locked, machine_id


def cancel_runs(runs: Sequence[RunFolder], console: Console) -> None:
    """Ask runs to save and end, and take what waits of them out of the queue.

    Raises:
        UserError: none of them is at work, or where one is at work cannot be reached from here.
    """
    # The last of a sweep first, so that none begins in the place of one that has ended.
    ended = [_cancel_jobs(folder, console) or _cancel_here(folder, console) for folder in reversed(runs)]
    if not any(ended):
        names = ", ".join(folder.name for folder in runs)
        verb = "is neither" if len(runs) == 1 else "are neither"
        raise UserError(f"{names} {verb} queued nor running; `diptych runs` shows what became of it")


def _cancel_jobs(run: RunFolder, console: Console) -> bool:
    """End the run's jobs; False where it has none."""
    submission = newest_submission(run)
    if submission is None or not submission.jobs:
        return False
    try:
        states = job_states(submission.jobs.values())
        found = False
        for job, job_id in submission.jobs.items():
            state = submission.state_of(job, states)
            if state is None or not state.is_open:
                continue
            found = True
            if job == "train":
                run.cancelled.touch()
            if job == "train" and not state.is_waiting:
                signal_job(job_id)
                say(console, f"job {job_id} saves and ends; `diptych resume {run.name}` goes on from there")
            else:
                cancel_job(job_id)
                say(console, f"job {job_id} ({job}) is taken out of the queue")
    except SlurmSilentError as error:
        raise UserError(f"{error}; nothing was cancelled, try again when it is back") from error
    return found


def _cancel_here(run: RunFolder, console: Console) -> bool:
    """Ask the launcher on this machine to end; False where the run is not being trained."""
    holder = holder_of(run)
    if holder is None or not is_locked(run):
        return False
    if holder.machine != machine_id() or holder.host != os.uname().nodename:
        raise UserError(
            f"{run.name} is being trained on {holder.host}, by process {holder.pid}; run this command there"
        )
    os.kill(holder.pid, signal.SIGTERM)
    say(console, f"process {holder.pid} saves and ends; `diptych resume {run.name}` goes on from there")
    return True


def resume_run(run: RunFolder, console: Console) -> int:
    """Start a run again with the config that it has: on Slurm if it was submitted, else here; returns the exit code."""
    config = run.next_config()
    submission = newest_submission(run)
    if submission is not None and submission.jobs:
        if not has_slurm():
            raise UserError(
                f"{run.name} was submitted to Slurm, and there is no sbatch on this machine; resume it on a "
                f"login node, or train it here with `diptych train {run.config_file}`"
            )
        queue_run(config, console, evaluate="evaluate" in submission.jobs)
        return 0
    return train_and_evaluate(config, ranks_of(run, config), console)


def ranks_of(run: RunFolder, config: RunConfig) -> int:
    """Number of ranks of the last time, if this machine has the GPUs for them; else that of `diptych train`."""
    before, gpus = run.world_size(), num_gpus()
    return choose_num_ranks(config, None if before is None or (gpus and before > gpus) else before)
