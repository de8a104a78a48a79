"""The batch scripts of a training and of its evaluation, written by submitit."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.slurm.submission import cpus_per_rank, node_counts
from pretrain.config.cluster import ClusterConfig
from pretrain.config.run import RunConfig
from pretrain.files import write_text
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


def batch_scripts(
    config: RunConfig, submission: Path, token: str, *, name: str, evaluate: bool = True, members: int = 0
) -> dict[str, str]:
    """Texts of the batch scripts by job, `train` and `evaluate`, for a run or for `members` runs as an array.

    What the evaluation depends on is said when it is submitted.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    cluster, scripts = config.cluster, {}
    jobs = {"train": ("diptych", _train_parameters(config))}
    if evaluate:
        jobs["evaluate"] = ("diptych-evaluate", _evaluation_parameters(cluster))
    for job, (kind, parameters) in jobs.items():
        setup = "".join(f"{line}\n" for line in cluster.setup)
        scripts[job] = _make_sbatch_string(
            command=_BODY.format(submission=shlex.quote(str(submission)), token=token, setup=setup, script=f"{job}.sh"),
            folder=submission,
            job_name=f"{kind}-{name}",
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
            # Slurm opens the output before the script can look whether the folder is there; the script does it itself.
            additional_parameters={"requeue": True, "output": "/dev/null", **cluster.sbatch},
            **parameters,
        )
    return scripts


def _train_parameters(config: RunConfig) -> dict[str, Any]:
    cluster, fewest, cpus = config.cluster, node_counts(config)[-1], cpus_per_rank(config)
    layout: dict[str, Any]
    if fewest == cluster.nodes:
        layout = {"nodes": cluster.nodes, "ntasks_per_node": cluster.ranks_per_node, "cpus_per_task": cpus}
    else:
        # Told how many tasks a node has, Slurm would always give the fewest nodes.
        layout = {"nodes": f"{fewest}-{cluster.nodes}", "cpus_per_task": cpus * cluster.ranks_per_node}
    return {
        **layout,
        "gpus_per_node": cluster.gpus_per_node or None,
        "time": cluster.time,
        "partition": cluster.partition,
        "mem": cluster.mem,
        "dependency": cluster.dependency,
        "signal_delay_s": cluster.signal_delay_s,
    }


def _evaluation_parameters(cluster: ClusterConfig) -> dict[str, Any]:
    job = cluster.evaluation
    return {
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": job.cpus,
        "gpus_per_node": (min(1, cluster.gpus_per_node) if job.gpus is None else job.gpus) or None,
        "time": job.time,
        "partition": job.partition or cluster.partition,
        "mem": job.mem,
    }


def write_scripts(folder: Path, scripts: Mapping[str, str]) -> None:
    """Keep the batch scripts in their submission's folder."""
    for job, script in scripts.items():
        write_text(folder / f"{job}.sbatch", script)


def show_scripts(
    config: RunConfig, console: Console, *, folder: Path, name: str, evaluate: bool = True, members: int = 0
) -> None:
    """Print what would be sent for a run, or for `members` runs as an array; `folder` is that of the run or sweep."""
    submission = RunFolder(folder).submissions / "NUMBER"
    scripts = batch_scripts(config, submission, "TOKEN", name=name, evaluate=evaluate, members=members)
    console.out(scripts["train"], highlight=False)
    if evaluate:
        after = "aftercorr" if members else "afterok"
        console.out(f"\n# And after it: sbatch --dependency={after}:JOB --kill-on-invalid-dep=yes\n", highlight=False)
        console.out(scripts["evaluate"], highlight=False)
