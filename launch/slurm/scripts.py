"""The batch scripts of a training and of its evaluation, written by submitit."""

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.slurm.submission import (
    cpus_per_rank,
    node_counts,
)
from pretrain.config.run import RunConfig
from pretrain.run.folder import RunFolder

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
    submission = RunFolder(folder).submissions / "NUMBER"
    console.out(train_script(config, submission, "TOKEN", name=name, members=members), highlight=False)
    if evaluate:
        after = "aftercorr" if members else "afterok"
        console.out(f"\n# And after it: sbatch --dependency={after}:JOB --kill-on-invalid-dep=yes\n", highlight=False)
        console.out(evaluation_script(config, submission, "TOKEN", name=name, members=members), highlight=False)
