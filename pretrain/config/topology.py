"""Which numbers of ranks a run can be spread over."""

from pretrain.config.run import RunConfig
from pretrain.errors import UserError


def _batch_sizes(config: RunConfig) -> list[int]:
    return [config.training.batch_size, *(phase.batch_size for phase in config.phases if phase.batch_size)]


def works_with(config: RunConfig, world_size: int) -> bool:
    """Whether the streams and every batch can be divided among so many ranks, those that share rows being one."""
    readers = config.parallel.data_ranks(world_size)
    numbers = (config.data.streams, *_batch_sizes(config))
    return world_size == readers * config.parallel.sequence and all(number % readers == 0 for number in numbers)


def check_cluster_ranks(config: RunConfig) -> None:
    """Refuse a number of ranks that the section `cluster` asks for; see `check_topology`."""
    check_topology(config, config.cluster.num_ranks, config.cluster.ranks_per_node)


def check_topology(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> None:
    """Refuse a number of ranks that the batch or the streams cannot be divided by, or `hybrid` without several nodes.

    `ranks_per_node` is by default all of them: one machine.

    Raises:
        UserError: naming the two numbers and the choices that work.
    """
    if not works_with(config, world_size):
        size = config.parallel.sequence
        works = [n for n in range(size, size * config.data.streams + 1, size) if works_with(config, n)]
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        if world_size % size:
            problem = f"{ranks} cannot be put into groups of parallel.sequence = {size}"
        else:
            groups = f" in groups of parallel.sequence = {size}" if size > 1 else ""
            problem = (
                f"{ranks}{groups} cannot share data.streams = {config.data.streams} and training.batch_size = "
                f"{', '.join(map(str, _batch_sizes(config)))} evenly"
            )
        raise UserError(f"{problem}; use one of {', '.join(map(str, works))} ranks, or change these")
    per_node = ranks_per_node or world_size
    if config.training.sharding == "hybrid" and (world_size % per_node or not 1 < per_node < world_size):
        raise UserError(
            "training.sharding = hybrid keeps the weights once more on the ranks of each node: it is for several nodes "
            f"with as many ranks each, at least 2, not for {world_size} ranks, {per_node} to a node; use "
            "training.sharding=full"
        )
