"""What to change in a run that does not fit into memory, in words."""

import math
from collections.abc import Iterator
from dataclasses import replace

from pretrain.config.parallel import ParallelConfig
from pretrain.config.run import RunConfig
from pretrain.training.cost.hardware import GIB, USABLE, Hardware
from pretrain.training.cost.plan import MemoryPlan

SHORTEST = 8
"""Positions of the shortest rows that are advised."""


def advice(config: RunConfig, vocab_size: int, hardware: Hardware) -> str:
    """Say in one sentence what to change in a run that has run out of memory, so that it needs much less than now."""
    plan = MemoryPlan(config, vocab_size, hardware)
    now = plan.need(plan.configured).total
    least = plan.need(plan.smallest).total
    better = plan.recommended(min(hardware.usable, 0.8 * now))
    head = f"By plan it needs {now / GIB:.3g} GiB a rank, of {hardware.memory / GIB:.3g} GiB"
    if better is not None:
        return f"{head}; {' '.join(better.overrides)} needs {plan.need(better).total / GIB:.3g} GiB"
    changes = ", or ".join(remedies(plan))
    return f"{head}, and no less than {least / GIB:.3g} GiB however it is spread: {changes}"


def remedies(plan: MemoryPlan) -> list[str]:
    """Return what would make a run fit that nothing makes fit on these devices, each remedy on its own."""
    return [
        *_more_devices(plan),
        *_shared_rows(plan),
        *_offloaded_optimizer(plan),
        *_shorter_rows(plan),
        f"use devices of {math.ceil(plan.need(plan.smallest).total / USABLE / GIB):,} GiB or more",
    ]


def _more_devices(plan: MemoryPlan) -> Iterator[str]:
    """The fewest, by doubling, over which it fits."""
    for doublings in range(1, 13):
        number = plan.hardware.world_size * 2**doublings
        if plan.varied(hardware=replace(plan.hardware, world_size=number)).fits(plan.smallest):
            yield f"use {number} devices"
            return


def _shared_rows(plan: MemoryPlan) -> Iterator[str]:
    """The fewest ranks to a row with which it fits on the devices that there are."""
    run, world_size = plan.run, plan.hardware.world_size
    lengths = {run.in_phase(phase).data.sequence_length for phase in range(len(run.phases) + 1)}
    numbers = {world_size, run.model.num_heads, *lengths}
    step = run.parallel.sequence
    for size in range(2 * step, world_size + 1, step):
        shared = run.model_copy(update={"parallel": ParallelConfig(sequence=size)})
        if all(number % size == 0 for number in numbers) and plan.varied(shared).fits(plan.smallest):
            yield f"share rows by parallel.sequence={size}"
            return


def _offloaded_optimizer(plan: MemoryPlan) -> Iterator[str]:
    """The optimizer in the host's memory, if the devices are not that themselves."""
    run = plan.run
    if not plan.hardware.on_gpu or run.optimizer.kind == "muon" or run.training.offload != "none":
        return
    # Whatever folder it would be, and a sharding that goes with it: choices have their own.
    updates = [{"sharding": "full", "offload_folder": "/", "offload": place} for place in ("cpu", "nvme")]
    in_memory, in_files = (
        plan.varied(run.model_copy(update={"training": run.training.model_copy(update=update)})) for update in updates
    )
    if not in_memory.fits(in_memory.smallest):
        return
    choice = in_memory.recommended() or in_memory.smallest
    whole, beside_files = (p.need(choice).host * plan.hardware.ranks_per_node / GIB for p in (in_memory, in_files))
    yield (
        f"keep the optimizer in host memory ({whole:,.0f} GiB a node, or {beside_files:,.0f} and the rest in "
        f"files with offload=nvme): {' '.join(['training.offload=cpu', *choice.overrides])}"
    )


def _shorter_rows(plan: MemoryPlan) -> Iterator[str]:
    """The longest rows, by halving, with which it fits."""
    length = plan.run.data.sequence_length // 2
    while length >= SHORTEST:
        data = plan.run.data.model_copy(update={"sequence_length": length})
        shortened = plan.run.model_copy(update={"data": data, "phases": []})
        if length % plan.run.parallel.sequence == 0 and plan.varied(shortened).fits(plan.smallest):
            yield f"shorten rows to data.sequence_length={length}"
            return
        length //= 2
