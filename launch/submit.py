"""`diptych submit`: from a config to a queued job, with everything refused that would fail there.

The batch script's parameters are checked and written by submitit. Nothing of submitit runs on the nodes: its pickled
functions, signal handlers and job states are what fails on real clusters (they know nothing of node failures, save on
rank 0 alone, and need accounting). The job is bash (`jobs/train.sh`) around the same ranks as everywhere else.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.control import CANCELLED
from launch.display import say
from launch.slurm import (
    SlurmSilentError,
    cancel_job,
    check_cluster,
    check_script,
    job_states,
    submit_script,
)
from launch.submission import (
    SUBMISSIONS,
    Submission,
    cpus_per_rank,
    new_submission,
    newest_submission,
    node_counts,
)
from pretrain.config import RunConfig, check_topology
from pretrain.data.manifest import MANIFEST, Manifest, load_manifest
from pretrain.errors import UserError
from pretrain.files import write_text
from pretrain.training.profiled_steps import ProfiledSteps

_BODY = """
submission={submission}
if [ ! -e "$submission/token-{token}" ]; then
    why="node $(hostname) does not see $submission: set runs= to a folder that all nodes share"
    scontrol update JobId="$SLURM_JOB_ID" Comment="diptych {token} error: $why"
    echo "error: $why" >&2
    exit 2
fi
exec >>"$submission/job-$SLURM_JOB_ID.out" 2>&1
{setup}. "$submission/{script}"
"""


def train_script(config: RunConfig, submission: Path, token: str, *, name: str, members: int = 0) -> str:
    """The batch script of a training, or of `members` trainings as an array."""
    cluster, fewest, cpus = config.cluster, node_counts(config)[-1], cpus_per_rank(config)
    layout: dict[str, Any]
    if fewest == cluster.nodes:
        layout = {"nodes": cluster.nodes, "ntasks_per_node": cluster.ranks_per_node, "cpus_per_task": cpus}
    else:
        # Told how many tasks a node has, Slurm would always give the fewest nodes.
        layout = {"nodes": f"{fewest}-{cluster.nodes}", "cpus_per_task": cpus * cluster.ranks_per_node}
    parameters: dict[str, Any] = {
        **layout,
        "gpus_per_node": cluster.gpus_per_node or None,
        "time": cluster.time,
        "partition": cluster.partition,
        "mem": cluster.mem,
        "dependency": cluster.dependency,
        "signal_delay_s": cluster.signal_delay_s,
    }
    return _script(config, submission, token, f"diptych-{name}", "train.sh", parameters, members)


def evaluation_script(config: RunConfig, submission: Path, token: str, *, name: str, members: int = 0) -> str:
    """The batch script of the evaluation; what it depends on is said when it is submitted."""
    cluster, job = config.cluster, config.cluster.evaluation
    parameters: dict[str, Any] = {
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": job.cpus,
        "gpus_per_node": (min(1, cluster.gpus_per_node) if job.gpus is None else job.gpus) or None,
        "time": job.time,
        "partition": job.partition or cluster.partition,
        "mem": job.mem,
    }
    return _script(config, submission, token, f"diptych-evaluate-{name}", "evaluate.sh", parameters, members)


def _script(
    config: RunConfig, submission: Path, token: str, job: str, script: str, parameters: dict[str, Any], members: int
) -> str:
    from submitit.slurm.slurm import _make_sbatch_string

    cluster = config.cluster
    setup = "".join(f"{line}\n" for line in cluster.setup)
    body = _BODY.format(submission=shlex.quote(str(submission)), token=token, setup=setup, script=script)
    text: str = _make_sbatch_string(
        command=body,
        folder=submission,
        job_name=job,
        account=cluster.account,
        qos=cluster.qos,
        constraint=cluster.constraint,
        exclude=cluster.exclude,
        comment=f"diptych {token}",
        wckey=None,
        use_srun=False,
        stderr_to_stdout=True,
        map_count=members or None,
        array_parallelism=cluster.array_parallelism,
        # Slurm opens the output before the script can look whether the folder is there; so the script does it itself.
        additional_parameters={"requeue": True, "output": "/dev/null", **cluster.sbatch},
        **parameters,
    )
    return text


def show_scripts(
    config: RunConfig, console: Console, *, folder: Path, name: str, evaluate: bool = True, members: int = 0
) -> None:
    """Print what would be sent for a run, or for `members` runs as an array; `folder` is that of the run or sweep."""
    submission = folder / SUBMISSIONS / "NUMBER"
    console.out(train_script(config, submission, "TOKEN", name=name, members=members), highlight=False)
    if evaluate:
        after = "aftercorr" if members else "afterok"
        console.out(f"\n# And after it: sbatch --dependency={after}:JOB --kill-on-invalid-dep=yes\n", highlight=False)
        console.out(evaluation_script(config, submission, "TOKEN", name=name, members=members), highlight=False)


def submit(
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
    check_topology(config, config.cluster.nodes * config.cluster.ranks_per_node, config.cluster.ranks_per_node)
    if queue:
        check_cluster(config.cluster)
        refuse_if_queued(config.run_folder)
    from launch.train import is_complete, profiling

    manifest = find_manifest(config)
    if queue:
        check_script(train_script(config, config.run_folder, "TOKEN", name=config.name))
        if evaluate:
            check_script(evaluation_script(config, config.run_folder, "TOKEN", name=config.name))
    if is_complete(config):
        raise UserError(
            f"{config.run_folder} is trained to its {config.training.tokens:,} tokens already; `diptych evaluate "
            f"context {config.name}` evaluates it again, a larger training.tokens trains it further"
        )
    variables = profiling(profile, config, manifest, console)
    folder, submission = prepare(config, manifest, console, allow_change, variables)
    scripts = {"train": train_script(config, folder, submission.token, name=config.name)}
    if evaluate:
        scripts["evaluate"] = evaluation_script(config, folder, submission.token, name=config.name)
    for name, script in scripts.items():
        write_text(folder / f"{name}.sbatch", script)
    if queue:
        queue_scripts(folder, submission, scripts)
        _say_what_is_queued(config, submission, console)
    return folder


def open_run(config: RunConfig, manifest: Manifest, console: Console, allow_change: Sequence[str] = ()) -> None:
    """Make the run folder, or check the one that is there; the run's lock is free again for a job that starts at once.

    Raises:
        UserError: the run is at work, or its folder holds another run.
    """
    from pretrain.training.run_folder import open_run_folder
    from pretrain.training.run_lock import run_lock

    with run_lock(config.run_folder):
        for line in open_run_folder(config, manifest, allow_change):
            say(console, f"{config.name}: {line}")
        (config.run_folder / CANCELLED).unlink(missing_ok=True)


def prepare(
    config: RunConfig,
    manifest: Manifest,
    console: Console,
    allow_change: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> tuple[Path, Submission]:
    """Open the run, and make a submission's folder with all that its jobs need.

    Raises:
        UserError: see `open_run`.
    """
    open_run(config, manifest, console, allow_change)
    return new_submission(config.run_folder, config, variables=variables)


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
    cluster = config.cluster
    ranks = cluster.nodes * cluster.ranks_per_node
    fewer = f" (or {', '.join(map(str, node_counts(config)[1:]))})" if len(node_counts(config)) > 1 else ""
    say(
        console,
        f"queued {config.name} as job {submission.jobs['train']}: {ranks} rank{'s' if ranks > 1 else ''} on "
        f"{cluster.nodes}{fewer} node{'s' if cluster.nodes > 1 else ''}, in {config.run_folder}",
    )
    if "evaluate" in submission.jobs:
        say(console, f"its evaluation follows as job {submission.jobs['evaluate']}")
    say(console, f"watch it with `diptych runs` and `diptych logs {config.name} -f`")


def find_manifest(config: RunConfig) -> Manifest:
    """The corpus's manifest, which must be there before a job is queued.

    Raises:
        UserError: there is no corpus.
    """
    if not config.corpus.url and not (config.corpus.path / MANIFEST).is_file():
        raise UserError(
            f"there is no corpus at {config.corpus.path}; build it first, with `diptych data build CONFIG`, here or "
            "in a job without GPUs: no GPU should wait for it"
        )
    from launch.display import make_console
    from launch.train import ensure_corpus

    return ensure_corpus(config.corpus, make_console()) if config.corpus.url else load_manifest(config.corpus.path)


def refuse_if_queued(run_folder: Path) -> None:
    """Refuse to start a run that Slurm has in its queue or on nodes.

    Where Slurm does not answer nobody knows; then the run's lock and its attempts keep a second writer out.

    Raises:
        UserError: it has.
    """
    submission = newest_submission(run_folder)
    if submission is None or not submission.jobs:
        return
    try:
        states = job_states(submission.jobs.values())
    except SlurmSilentError:
        return
    for job, job_id in submission.jobs.items():
        state = submission.state_of(job, states)
        if state is not None and state.is_open:
            doing = "queued" if state.is_waiting else "running"
            raise UserError(
                f"{run_folder.name} is {doing} already, as job {job_id} ({job}, {state.state}); `diptych cancel "
                f"{run_folder.name}` ends it, after it has saved; or choose another name=..."
            )
