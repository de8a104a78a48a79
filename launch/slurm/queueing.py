"""`diptych submit`: from a config to a queued job, with everything refused that would fail there.

The batch script's parameters are checked and written by submitit. Nothing of submitit runs on the nodes: its pickled
functions, signal handlers and job states are what fails on real clusters (they know nothing of node failures, save on
rank 0 alone, and need accounting). The job is bash (`jobs/train.sh`) around the same ranks as everywhere else.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.preparation import find_manifest, profile_variables
from launch.slurm.queries import cancel_job, check_script, submit_script
from launch.slurm.refusals import check_cluster, refuse_if_queued
from launch.slurm.scripts import batch_scripts, write_scripts
from launch.slurm.submission import Submission, new_submission, node_counts
from launch.terminal.console import say
from pretrain.config.run import RunConfig
from pretrain.config.topology import check_cluster_ranks
from pretrain.data.manifest import Manifest
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.lock import run_lock
from pretrain.run.opening import is_trained, open_run_folder
from pretrain.training.monitor.profiled_steps import ProfiledSteps


def queue_run(
    config: RunConfig,
    console: Console,
    *,
    evaluate: bool,
    queue: bool = True,
    allow_change: Sequence[str] = (),
    profile: ProfiledSteps | None = None,
) -> Path:
    """Queue a training, or its continuation, and its evaluation; returns the submission's folder.

    With `queue` False all is prepared, but nothing is queued: for sites whose jobs are submitted in another way. The
    steps of `profile` are recorded.

    Raises:
        UserError: it would fail, be refused by Slurm, or is at work already.
    """
    run = RunFolder.of(config)
    check_cluster_ranks(config)
    if queue:
        check_cluster(config.cluster)
        refuse_if_queued(run)
    manifest = find_manifest(config)
    if queue:
        for script in batch_scripts(config, run.path, "TOKEN", name=config.name, evaluate=evaluate).values():
            check_script(script)
    if is_trained(config):
        raise UserError(
            f"{run} is trained to its {config.training.tokens:,} tokens already; `diptych evaluate "
            f"context {config.name}` evaluates it again, a larger training.tokens trains it further"
        )
    folder, submission = prepare(config, manifest, console, allow_change, profile)
    scripts = batch_scripts(config, folder, submission.token, name=config.name, evaluate=evaluate)
    write_scripts(folder, scripts)
    if queue:
        queue_scripts(folder, submission, scripts)
        _say_what_is_queued(config, submission, console)
    return folder


def open_run(config: RunConfig, manifest: Manifest, console: Console, allow_change: Sequence[str] = ()) -> None:
    """Make the run folder, or check the one that is there; the run's lock is free again for a job that starts at once.

    Raises:
        UserError: the run is at work, or its folder holds another run.
    """
    run = RunFolder.of(config)
    with run_lock(run):
        for line in open_run_folder(config, manifest, allow_change):
            say(console, f"{config.name}: {line}")
        run.cancelled.unlink(missing_ok=True)


def prepare(
    config: RunConfig,
    manifest: Manifest,
    console: Console,
    allow_change: Sequence[str] = (),
    profile: ProfiledSteps | None = None,
) -> tuple[Path, Submission]:
    """Open the run, and make a submission's folder with all that its jobs need, the steps to profile among it.

    Raises:
        UserError: the run does not come to these steps, or see `open_run`.
    """
    variables = profile_variables(profile, config, manifest, console)
    open_run(config, manifest, console, allow_change)
    return new_submission(RunFolder.of(config).submissions, config, variables=variables)


def queue_scripts(folder: Path, submission: Submission, scripts: dict[str, str], after: str = "afterok") -> None:
    """Queue a training and then, depending on it, its evaluation; all or nothing."""
    try:
        submission.jobs["train"] = submit_script(scripts["train"])
        submission.write(folder)
        if "evaluate" in scripts:
            options = [f"--dependency={after}:{submission.jobs['train']}", "--kill-on-invalid-dep=yes"]
            submission.jobs["evaluate"] = submit_script(scripts["evaluate"], options)
            submission.write(folder)
    except UserError:
        if "train" in submission.jobs:
            cancel_job(submission.jobs["train"])
        raise


def _say_what_is_queued(config: RunConfig, submission: Submission, console: Console) -> None:
    cluster, ranks, fewer_nodes = config.cluster, config.cluster.num_ranks, node_counts(config)[1:]
    fewer = f" (or {', '.join(map(str, fewer_nodes))})" if fewer_nodes else ""
    say(
        console,
        f"queued {config.name} as job {submission.jobs['train']}: {ranks} rank{'s' if ranks > 1 else ''} on "
        f"{cluster.nodes}{fewer} node{'s' if cluster.nodes > 1 else ''}, in {config.run_folder}",
    )
    if "evaluate" in submission.jobs:
        say(console, f"its evaluation follows as job {submission.jobs['evaluate']}")
    say(console, f"watch it with `diptych runs` and `diptych logs {config.name} -f`")
