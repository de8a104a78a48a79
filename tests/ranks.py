"""Run a function on several real gloo ranks, each a process of its own.

A rank needs three seconds to import torch, DeepSpeed and the trainer. So one process imports them (rank_server.py),
and the ranks of all tests are forked from it, each with the environment of the test.
"""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain.config.run import RunConfig
from pretrain.run.attempt import agree_on_attempt
from pretrain.run.folder import RunFolder
from pretrain.training.ranks import Ranks, end_rank

if TYPE_CHECKING:
    from pretrain.training.monitor.monitor import Monitor
    from pretrain.training.trainer import Trainer

multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.rank_server"])


def run_on_ranks(function: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on each rank; returns what each returned. `folder` is for their meeting point."""
    results = folder / "results"
    results.mkdir(parents=True)
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(world_size)}
    ranks = mp.start_processes(
        _rank, (str(folder), environment, function, arguments), world_size, join=False, start_method="forkserver"
    )
    try:
        while not ranks.join():
            pass
    finally:
        for process in ranks.processes:
            process.kill()
    return [torch.load(results / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(
    rank: int, folder: str, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.seed()  # Each rank would begin with the random state of the process that it is forked from.
    torch.set_num_threads(1)
    world_size = int(environment["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    torch.save(function(rank, *arguments), Path(folder) / "results" / f"{rank}.pt")
    end_rank(0)


class NoStop:
    """A run that nobody stops."""

    requested = False
    signal_name = None


def trainer_of(
    config: RunConfig,
    rank: int,
    world_size: int,
    stop: Any = None,
    *,
    monitor: "type[Monitor] | None" = None,
    trainer: "type[Trainer] | None" = None,
) -> "Trainer":
    """A trainer as a rank of a run has it; `monitor` and `trainer` may be classes that look on at what happens."""
    from pretrain.training.monitor.monitor import Monitor  # seconds, which only the ranks need to pay
    from pretrain.training.trainer import Trainer

    ranks = Ranks(rank, world_size, torch.device("cpu"))
    attempt = agree_on_attempt(RunFolder.of(config))
    return (trainer or Trainer)(config, ranks, (monitor or Monitor)(config, attempt, ranks, stop or NoStop()))


def train_alone(rank: int, config: RunConfig) -> None:
    """Train on the only rank; not in a conftest, whose name as a module is that of every other conftest."""
    trainer_of(config, rank, 1).fit()
