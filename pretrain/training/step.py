"""The arithmetic of one optimizer step: what all ranks agree on first, then forward, backward and update."""

import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch
from pretrain.errors import UserError
from pretrain.model.sequence_parallel import SequenceGroup
from pretrain.training.monitor.clock import StepClock
from pretrain.training.monitor.norms import Inspection
from pretrain.training.zero.engine import Engine


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks, known before the first forward."""

    masked: int
    """Positions to predict; what the summed loss is divided by."""
    tokens: int
    """Positions that are not padding."""
    rows_checksum: int
    """Of all rows and their masks; the same for any number of ranks."""
    samples_lost: int
    """Since the run began, in damaged shards."""
    stop: bool
    """Some rank was asked to stop: the step must not be taken."""


def agree_on_step(
    batch: Batch, samples_lost: int, stop_requested: bool, sequence: SequenceGroup | None = None
) -> StepTotals:
    """One small all-reduce on the CPU: counts, checksum, and whether to stop. Arguments are this rank's share.

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


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """What torch's generator is seeded with before a micro-batch, so that a resumed run drops the same elements."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0] >> 1)


def train_step(
    engine: Engine,
    batch: Batch,
    totals: StepTotals,
    micro_batch_size: int,
    world_size: int,
    dropout_key: tuple[int, int, int] | None = None,
    refuse: Callable[[Tensor], bool] | None = None,
    clock: StepClock | None = None,
    inspection: Inspection | None = None,
) -> Tensor:
    """Forward and backward over the micro-batches of this rank's rows, then the update.

    The loss is the sum over masked positions divided by the masked positions of the whole step, over all ranks and
    micro-batches: not a mean of means. ZeRO divides gradients by the number of ranks, hence the factor.
    `dropout_key` is (seed, step, rank), None without dropout. `refuse` is given this rank's sums when all of them are
    known, and says, on all ranks alike, that the optimizer must not move: then the last gradients are made NaN, which
    the engine skips at every sharding. `clock` is told what is done when, and `inspection` looks at gradients and
    weights around the update.

    Returns:
        float32 [2] on the device: this rank's summed loss in nats, and its correctly predicted positions.
    """
    clock = clock or StepClock(engine.device)
    sums = torch.zeros(2, device=engine.device)
    scale = world_size / max(totals.masked, 1)
    micro_batches = list(batch.split(micro_batch_size))
    for number, micro_batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        if dropout_key is not None:
            torch.manual_seed(dropout_seed(*dropout_key, number))
        placed = engine.place(micro_batch)
        with clock.section("forward"):
            losses, correct = engine.forward(*placed)
        loss = losses.sum()
        sums += torch.stack((loss.detach(), correct.sum()))
        if refuse is not None and last and refuse(sums):
            scale = math.nan
        with clock.section("backward"):
            engine.backward(loss * scale)
        if inspection is not None and last:
            inspection.before_update()
        with clock.section("optimizer"):
            engine.step()
    if inspection is not None:
        inspection.after_update()
    return sums


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterable[Batch], stop: Callable[[], bool]) -> Tensor | None:
    """Sums over all ranks' batches, or None where `stop`, which is asked before each, says so; collective.

    Returns:
        float32 [3] on the device: summed loss in nats, correct predictions, masked positions.
    """
    engine.eval()
    sums = torch.zeros(3, device=engine.device)
    cut_off = False
    for batch in batches:
        cut_off = stop()
        if cut_off:
            break
        losses, correct = engine.forward(*engine.place(batch))
        sums += torch.stack((losses.sum(), correct.sum(), torch.tensor(float(len(losses)), device=engine.device)))
    engine.train()
    if cut_off:
        return None
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums
