"""Small collectives over all ranks, on the CPU: what a step needs to know of all of them before it is taken."""

import zlib

import numpy as np
import torch
import torch.distributed as dist

from pretrain.batch import Batch
from pretrain.errors import UserError
from pretrain.model.sequence_parallel import SequenceGroup
from pretrain.training.step_record import StepTotals


def agree_on_step(
    batch: Batch, samples_lost: int, stop_requested: bool, sequence: SequenceGroup | None = None
) -> StepTotals:
    """Sum counts, checksum and stop requests over the ranks, each giving its share, in one small all-reduce.

    Ranks that share rows (`sequence`) all have them whole, and the first of them counts them.

    Raises:
        UserError: on every rank; ranks that share rows have read different ones.
    """
    rows = np.concatenate([batch.input_ids.numpy(), batch.labels.numpy()], axis=1)
    checksum = sum(zlib.crc32(row) for row in rows)
    first, others = sequence is None or sequence.index == 0, 0 if sequence is None else sequence.size - 1
    counts = [batch.num_masked, batch.num_tokens, checksum, samples_lost]
    # The first of a group has the checksum of each of the others taken from its own: together they are zero.
    difference = checksum * others if first else -checksum
    own = [*(counts if first else [0] * len(counts)), int(stop_requested), difference]
    totals = torch.tensor(own, dtype=torch.int64)
    if dist.is_initialized():
        dist.all_reduce(totals)
    masked, tokens, checksum, lost, stop, difference = totals.tolist()
    if difference:
        raise UserError(
            "a shard was damaged for one rank and whole for another that shares its rows (parallel.sequence): it was "
            "changed while the run read it; see that nothing writes to the corpus, and run the same command again: it "
            "resumes"
        )
    return StepTotals(masked, tokens, checksum, lost, bool(stop))


def any_rank(value: bool) -> bool:
    """Tell whether `value` is true on any rank; collective."""
    flag = torch.tensor(int(value))
    if dist.is_initialized():
        dist.all_reduce(flag)
    return bool(flag)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
