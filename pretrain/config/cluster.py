"""The section `cluster`: what a run asks of Slurm. Read by `diptych submit` and `diptych sweep`, ignored elsewhere."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pretrain.config.section import Count, Section


def _slurm_time(value: Any) -> Any:
    """A time as Slurm writes it; a number is seconds, which is how YAML reads 24:00:00 without quotes."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value // 3600:02d}:{value // 60 % 60:02d}:{value % 60:02d}"
    if isinstance(value, str):
        time_seconds(value)
    return value


def time_seconds(time: str) -> int:
    """Seconds of a Slurm time: [DAYS-]HOURS:MINUTES:SECONDS, DAYS-HOURS[:MINUTES], MINUTES:SECONDS or MINUTES.

    Raises:
        ValueError: it is none of these.
    """
    days, dash, rest = time.rpartition("-")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise ValueError("expected HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS, for instance 24:00:00")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    return int(days or 0) * 86_400 + hours * 3600 + minutes * 60 + seconds


SlurmTime = Annotated[str, BeforeValidator(_slurm_time)]


class EvaluationJobConfig(Section):
    """The job that evaluates the run when it is trained: one process on one node."""

    time: SlurmTime = "01:00:00"
    """Time limit."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs; by default one if the training uses any."""
    cpus: Count = 4
    """CPU cores."""
    mem: str | None = None
    """Memory, for instance 32G; by default what Slurm gives."""
    partition: str | None = None
    """Partition; by default that of the training."""


class ClusterConfig(Section):
    """What a run asks of Slurm. One task per rank; a rank per GPU, or per node where there is none."""

    nodes: Count = 1
    """Nodes to train on."""
    min_nodes: Count | None = None
    """Start, and go on after a failure, with as few nodes as this; the global batch stays the same."""
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    """GPUs of each node, a rank for each; 0 trains on the processors, over gloo."""
    tasks_per_node: Count | None = None
    """Ranks on each node; by default one per GPU, or one."""
    cpus_per_task: Count | None = None
    """CPU cores of each rank; by default one, and one for each of `data.workers`."""
    time: SlurmTime = "24:00:00"
    """Time limit of one start. The run saves before it, and queues itself again."""
    partition: str | None = None
    """Partition; by default the cluster's default one."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    mem: str | None = None
    """Memory of each node, for instance 64G; by default what Slurm gives."""
    constraint: str | None = None
    """Features that the nodes must have."""
    exclude: str | None = None
    """Nodes to stay away from."""
    dependency: str | None = None
    """Condition to start on, for instance afterok:1234."""
    array_parallelism: Count = 4
    """Members of a sweep that train at the same time."""
    setup: list[str] = Field(default=[])
    """Lines of shell to run first on the first node, for instance module load cuda."""
    container: str | None = None
    """Image to run the ranks in. It must hold Diptych's dependencies; the code itself comes from the run folder."""
    container_runtime: Literal["auto", "pyxis", "apptainer"] = "auto"
    """`auto` is apptainer for a .sif file, and otherwise pyxis (`srun --container-image`)."""
    python: str | None = None
    """Python of the nodes; by default the one that runs this command, in a container python3."""
    signal_delay_s: Count = 120
    """Seconds before the time limit at which Slurm signals the ranks to save; Slurm may be up to 60 s early."""
    max_requeues: Annotated[int, Field(ge=0)] = 100
    """A run that was started again so many times does not queue itself again."""
    sbatch: dict[str, bool | int | str] = Field(default={})
    """Other options of sbatch, for instance {reservation: mine}."""
    evaluation: EvaluationJobConfig = EvaluationJobConfig()

    @property
    def ranks_per_node(self) -> int:
        """Tasks of each node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def num_ranks(self) -> int:
        """Tasks of all nodes."""
        return self.nodes * self.ranks_per_node

    @model_validator(mode="after")
    def _parts_fit(self) -> "ClusterConfig":
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes = {self.min_nodes} is more than nodes = {self.nodes}")
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ValueError(f"tasks_per_node = {self.tasks_per_node}, but a rank needs one of the GPUs of its node")
        return self
