"""Small collectives over all ranks, on the CPU."""

import torch
import torch.distributed as dist


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def any_rank(value: bool) -> bool:
    """Whether it is true on any rank; collective, on the CPU."""
    flag = torch.tensor(int(value))
    if dist.is_initialized():
        dist.all_reduce(flag)
    return bool(flag)
