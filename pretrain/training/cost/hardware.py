"""The devices that a plan is for, as far as memory and speed depend on them."""

import os
from dataclasses import dataclass

import torch

from pretrain.training.zero.settings import ranks_per_node

GIB = 2**30
USABLE = 0.92
"""Share of a device's memory that a plan may fill: its driver, NCCL and fragmentation take the rest (an assumption)."""


@dataclass(frozen=True)
class Hardware:
    """What the ranks run on, one rank to a device."""

    name: str
    memory: int
    """Bytes that one rank may have."""
    world_size: int
    on_gpu: bool
    ranks_per_node: int
    """Ranks that share a node: what `hybrid` spreads the weights over once more."""
    peak: float | None = None
    """FLOP/s of one device in dense bf16; None where it is not known."""

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(USABLE * self.memory)


def this_processor(world_size: int, ranks_per_node: int, peak: float | None = None) -> Hardware:
    """Return ranks on processors with the memory of this machine, which those of a node share."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware("cpu", memory // ranks_per_node, world_size, on_gpu=False, ranks_per_node=ranks_per_node, peak=peak)


def this_hardware(device: torch.device, world_size: int) -> Hardware:
    """Return what the ranks of this process group run on, taken to be all alike; `device` is this rank's."""
    per_node = ranks_per_node(world_size)
    if device.type != "cuda":
        return this_processor(world_size, per_node)
    properties = torch.cuda.get_device_properties(device)
    return Hardware(properties.name, properties.total_memory, world_size, on_gpu=True, ranks_per_node=per_node)
