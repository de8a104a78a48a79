"""The arithmetic of one optimizer step: forward and backward over its micro-batches, then the update."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch
from pretrain.training.guards import Guard
from pretrain.training.monitor.clock import StepClock
from pretrain.training.monitor.norms import Inspection
from pretrain.training.step_record import StepOutcome, StepTotals
from pretrain.training.zero.engine import Engine


def dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Seed of torch's generator for a micro-batch, by which a resumed run drops the same elements."""
    return int(np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)[0] >> 1)


def train_step(
    engine: Engine,
    batch: Batch,
    totals: StepTotals,
    step: int = 0,
    *,
    guard: Guard | None = None,
    clock: StepClock | None = None,
    inspection: Inspection | None = None,
) -> StepOutcome:
    """Forward and backward over the micro-batches of this rank's rows, then the update; collective.

    The loss is the sum over masked positions divided by the masked positions of the whole step, over all ranks and
    micro-batches: not a mean of means. ZeRO divides gradients by the number of ranks, hence the factor.

    Args:
        engine: what is trained; its config says the size of a micro-batch and the dropout.
        batch: this rank's rows.
        totals: of the whole step.
        step: steps before this one; dropout depends on it.
        guard: asked whether the loss of the whole step may be learned from, before the optimizer moves. If not, the
            last gradients are made NaN, which the engine skips at every sharding.
        clock: told what is done when.
        inspection: looks at gradients and weights around the update.
    """
    config, clock = engine.config, clock or StepClock(engine.device)
    sums = torch.zeros(2, device=engine.device)
    loss: float | None = None
    skipped: str | None = None
    scale = engine.world_size / max(totals.masked, 1)
    micro_batches = list(batch.split(config.training.micro_batch_size))
    for number, micro_batch in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        if config.model.dropout:
            torch.manual_seed(dropout_seed(config.seed, step, engine.rank, number))
        local = _forward(engine, micro_batch, sums, clock)
        if guard is not None and last:
            loss = _step_loss(sums, totals, clock)
            skipped = guard.objection(loss)
        with clock.section("backward"):
            engine.backward(local * (scale if skipped is None else math.nan))
        if inspection is not None and last:
            inspection.before_update()
        with clock.section("optimizer"):
            engine.step()
    if inspection is not None:
        inspection.after_update()
    grad_norm = engine.grad_norm
    skipped = skipped or (None if math.isfinite(grad_norm) else "its gradient norm is not finite")
    return StepOutcome(sums, grad_norm, loss, skipped)


def _forward(engine: Engine, micro_batch: Batch, sums: Tensor, clock: StepClock) -> Tensor:
    """Summed loss of a micro-batch, which is added to `sums`, as are its correct predictions."""
    placed = engine.place(micro_batch)
    with clock.section("forward"):
        losses, correct = engine.forward(*placed)
    loss = losses.sum()
    sums += torch.stack((loss.detach(), correct.sum()))
    return loss


def _step_loss(sums: Tensor, totals: StepTotals, clock: StepClock) -> float:
    """Nats per masked position over all ranks; waits for the device."""
    summed = sums[0].double()  # as in the metrics: in any order
    if dist.is_initialized():
        with clock.section("communication"):
            dist.all_reduce(summed)
    return float(summed) / max(totals.masked, 1)


@torch.no_grad()
def evaluate_batches(engine: Engine, batches: Iterable[Batch], stop: Callable[[], bool]) -> Tensor | None:
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
