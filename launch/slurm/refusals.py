"""What is refused before a job is queued: a run at work already, and what the cluster does not give."""

from launch.slurm.queries import NOTHING_SUBMITTED, SlurmSilentError, has_slurm, job_states, partitions
from launch.slurm.submission import newest_submission
from pretrain.config.cluster import ClusterConfig, time_seconds
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder


def refuse_if_queued(run: RunFolder) -> None:
    """Refuse to start a run that Slurm has in its queue or on nodes.

    Where Slurm does not answer nobody knows; then the run's lock and its attempts keep a second writer out.

    Raises:
        UserError: it has.
    """
    submission = newest_submission(run)
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
                f"{run.name} is {doing} already, as job {job_id} ({job}, {state.state}); `diptych cancel "
                f"{run.name}` ends it, after it has saved; or choose another name=..."
            )


def check_partition(name: str | None, nodes: int, time: str, where: str = "cluster") -> None:
    """Refuse a partition that does not exist, or more than it allows; `where` is the config section that asks.

    Raises:
        UserError: naming what is asked for and what is allowed.
    """
    known = partitions()
    names = ", ".join(partition.name for partition in known)
    chosen = next((p for p in known if p.name == name or (name is None and p.is_default)), None)
    if chosen is None:
        asked = f"there is no partition {name!r}" if name else "this cluster has no default partition"
        raise UserError(f"{asked}; set {where}.partition (--partition) to one of {names}")
    if not chosen.is_up:
        raise UserError(f"partition {chosen.name} takes no jobs at the moment; there are {names}")
    if chosen.max_nodes is not None and nodes > chosen.max_nodes:
        raise UserError(
            f"{where}.nodes = {nodes}, but partition {chosen.name} gives a job at most {chosen.max_nodes} nodes; ask "
            f"for fewer, or set {where}.partition to another of {names}"
        )
    if chosen.max_time_s is not None and time_seconds(time) > chosen.max_time_s:
        raise UserError(
            f"{where}.time = {time}, but partition {chosen.name} gives a job at most "
            f"{chosen.max_time_s // 3600}:{chosen.max_time_s // 60 % 60:02d}:{chosen.max_time_s % 60:02d}; ask for "
            f"less (the run saves before the limit and queues itself again), or set {where}.partition to another of "
            f"{names}"
        )


def check_cluster(cluster: ClusterConfig) -> None:
    """Refuse what this cluster cannot give, before anything is queued.

    Raises:
        UserError: no Slurm here, or see `check_partition`.
    """
    if not has_slurm():
        raise UserError(
            "there is no sbatch on this machine: submit from a login node of a Slurm cluster, or train here with "
            "`diptych train` (--dry-run prints the script without Slurm)"
        )
    try:
        check_partition(cluster.partition, cluster.nodes, cluster.time)
        evaluation = cluster.evaluation
        check_partition(evaluation.partition or cluster.partition, 1, evaluation.time, "cluster.evaluation")
    except SlurmSilentError as error:
        raise UserError(f"{error}; {NOTHING_SUBMITTED}") from error
