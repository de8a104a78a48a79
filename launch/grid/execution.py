"""The trainings of a sweep: here one after another, on Slurm as an array, or in jobs of the user's own script."""

import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from launch.grid.members import Sweep
from launch.pipeline import choose_num_ranks, train_and_evaluate
from launch.preparation import find_manifest
from launch.slurm.in_job import prepare_run
from launch.slurm.queries import check_script
from launch.slurm.queueing import open_run, queue_scripts
from launch.slurm.refusals import check_cluster, refuse_if_queued
from launch.slurm.scripts import batch_scripts, show_scripts, write_scripts
from launch.slurm.submission import Submission, make_folder, new_submission
from launch.terminal.console import say
from pretrain.config.run import RunConfig
from pretrain.config.topology import check_cluster_ranks
from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUME_ME, UserError
from pretrain.run.folder import RunFolder
from pretrain.run.opening import is_trained


def is_finished(config: RunConfig) -> bool:
    """Whether a member is trained and evaluated."""
    run = RunFolder.of(config)
    return is_trained(config) and bool(run.reports())


def run_here(sweep: Sweep, num_ranks: int | None, console: Console) -> int:
    """Train and evaluate the members one after another; one that fails does not stop the rest.

    Returns:
        0 if all are done, 75 if it was interrupted, 1 if some failed.
    """
    failed = []
    for number, (member, config) in enumerate(zip(sweep.members, sweep.configs, strict=True), start=1):
        say(console, f"\n[{number}/{len(sweep.members)}] {member.name}", "bold")
        if is_finished(config):
            say(console, "  done already")
            continue
        try:
            exit_code = train_and_evaluate(config, choose_num_ranks(config, num_ranks), console)
        except UserError as error:
            say(console, f"error: {error}", "red")
            exit_code = EXIT_FAILED
        if exit_code == EXIT_RESUME_ME:
            return exit_code
        if exit_code != EXIT_DONE:
            failed.append(member.name)
    if failed:
        names = ", ".join(failed)
        say(console, f"\n{len(failed)} of {len(sweep.members)} failed: {names}; the same command tries again")
    return EXIT_FAILED if failed else EXIT_DONE


def show_sweep(sweep: Sweep, console: Console, *, local: bool) -> None:
    """Print the members and, unless they are to be trained here, what `submit_sweep` would send for them."""
    for config in sweep.configs if not local else ():
        check_cluster_ranks(config)
    console.out(f"# {len(sweep.members)} members in {sweep.folder}", highlight=False)
    for number, member in enumerate(sweep.members):
        console.out(f"#   {number:3d}  {member.name}  {' '.join(member.overrides)}", highlight=False)
    if not local:
        show_scripts(sweep.configs[0], console, folder=sweep.folder, name=sweep.name, members=len(sweep.members))


def submit_sweep(sweep: Sweep, console: Console) -> None:
    """Queue the members that are neither finished nor at work, as one array, and an array of their evaluations.

    Raises:
        UserError: Slurm or a member's run folder refuses.
    """
    for config in sweep.configs:
        check_cluster_ranks(config)
    first = sweep.configs[0]
    check_cluster(first.cluster)
    waiting = [config for config in sweep.configs if not is_finished(config) and not _at_work(config, console)]
    if not waiting:
        say(console, "nothing to do: every member is finished or at work")
        return
    check_script(batch_scripts(first, sweep.folder, "TOKEN", name=sweep.name, members=len(waiting))["train"])
    for config in waiting:
        open_run(config, find_manifest(config), console)
    folder, submission = new_submission(
        RunFolder(sweep.folder).submissions, first, [config.run_folder for config in waiting]
    )
    scripts = batch_scripts(first, folder, submission.token, name=sweep.name, members=len(waiting))
    write_scripts(folder, scripts)
    queue_scripts(folder, submission, scripts, after="aftercorr")
    for index, config in enumerate(waiting):
        jobs = {job: f"{job_id}_{index}" for job, job_id in submission.jobs.items()}
        own = Submission(submission.created, submission.token, jobs, submission.commit)
        own.write(make_folder(RunFolder.of(config).submissions))
    say(
        console,
        f"queued {len(waiting)} of {len(sweep.configs)} members of {sweep.name} as job {submission.jobs['train']}, "
        f"{first.cluster.array_parallelism} at a time; their evaluations follow as job {submission.jobs['evaluate']}",
    )
    say(console, f"watch them with `diptych runs`, see results with `diptych sweep show {sweep.name}`")


def _at_work(config: RunConfig, console: Console) -> bool:
    try:
        refuse_if_queued(RunFolder.of(config))
    except UserError as error:
        say(console, str(error))
        return True
    return False


def prepare_member(sweep: Sweep, console: Console, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Prepare the member of a sweep that the job's place in its array stands for, as `prepare_run` does a run.

    Raises:
        UserError: there is no such member, or see `prepare_run`.
    """
    task, last = environment.get("SLURM_ARRAY_TASK_ID"), len(sweep.members) - 1
    if task is None or int(task) > last:
        place = "this job is in no array" if task is None else f"there is no member {task}"
        raise UserError(
            f"{place}; the members of {sweep.name} are 0 to {last}: sbatch --array=0-{last}%4 slurm/sweep.sbatch CONFIG"
        )
    config = sweep.configs[int(task)]
    say(console, f"member {task} of {sweep.name}: {config.name}")
    if is_finished(config):
        say(console, f"{config.run_folder} is trained and evaluated already")
        return None
    sweep.write()
    return prepare_run(config, console, (), environment)
