"""The arithmetic of one optimizer step: what all ranks agree on first, then forward, backward and update."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch
from pretrain.model.layout import AttentionLayout
from pretrain.training.engine import Engine


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks, known before the first forward."""

    masked: int
    """Positions to predict; what the summed loss is divided by."""
    tokens: int
    """Positions that are not padding."""
    rows_checksum: int
    """Of all rows and their masks; the same for any number of ranks."""
    stop: bool
    """Some rank was asked to stop: the step must not be taken."""


def agree_on_step(batch: Batch, stop_requested: bool) -> StepTotals:
    """One small all-reduce on the CPU: counts, checksum, and whether to stop."""
    rows = np.concatenate([batch.input_ids.numpy(), batch.labels.numpy()], axis=1)
    checksum = sum(zlib.crc32(row) for row in rows)
    totals = torch.tensor([batch.num_masked, batch.num_tokens, checksum, int(stop_requested)], dtype=torch.int64)
    if dist.is_initialized():
        dist.all_reduce(totals)
    masked, tokens, checksum, stop = totals.tolist()
    return StepTotals(masked, tokens, checksum, bool(stop))


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
) -> Tensor:
    """Forward and backward over the micro-batches of this rank's rows, then the update.

    The loss is the sum over masked positions divided by the masked positions of the whole step, over all ranks and
    micro-batches: not a mean of means. ZeRO divides gradients by the number of ranks, hence the factor.
    `dropout_key` is (seed, step, rank), None without dropout.

    Returns:
        float32 [2] on the device: this rank's summed loss in nats, and its correctly predicted positions.
    """
    sums = torch.zeros(2, device=engine.device)
    scale = world_size / max(totals.masked, 1)
    for number, micro_batch in enumerate(batch.split(micro_batch_size)):
        if dropout_key is not None:
            torch.manual_seed(dropout_seed(*dropout_key, number))
        layout = AttentionLayout.from_batch(micro_batch).to(engine.device)
        losses, correct = engine.forward(micro_batch.to(engine.device), layout)
        loss = losses.sum()
        engine.backward(loss * scale)
        engine.step()
        sums += torch.stack((loss.detach(), correct.sum()))
    return sums


@torch.no_grad()
def evaluate_batch(engine: Engine, batch: Batch) -> Tensor:
    """float32 [3] on the device: summed loss in nats, correct predictions, masked positions."""
    layout = AttentionLayout.from_batch(batch).to(engine.device)
    losses, correct = engine.forward(batch.to(engine.device), layout)
    return torch.stack((losses.sum(), correct.sum(), torch.tensor(float(len(losses)), device=engine.device)))
