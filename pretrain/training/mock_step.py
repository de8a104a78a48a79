"""A step before the first, at the largest shape of the run: what does not fit in memory fails in the first minute.

It is a whole step, with its gradients, collectives and optimizer, at learning rate zero; the moments that it moves are
set back to zero, and it comes before any checkpoint is loaded. So weights, random numbers and the rows of the run are
those of a run without it.
"""

import torch

from pretrain.batch import IGNORED, Batch
from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.training.cost.advice import advice
from pretrain.training.cost.hardware import this_hardware
from pretrain.training.cost.plan import MemoryPlan
from pretrain.training.zero.engine import Engine
from pretrain.training.zero.settings import accumulation_steps


def mock_step(engine: Engine, run: RunConfig, vocab_size: int) -> int:
    """Take it; collective. The engine's phase is to be entered after it.

    Returns:
        The bytes that a rank needs by plan.

    Raises:
        UserError: memory ran out; says what the plan advises.
    """
    hardware = this_hardware(engine.device, engine.world_size)
    with torch.random.fork_rng([engine.device] if engine.device.type == "cuda" else []):
        plan = MemoryPlan(run, vocab_size, hardware)
        largest = plan.configured.applied_to(plan.config)
        try:
            _take_step(engine, largest, vocab_size)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            shape = f"{largest.training.micro_batch_size} rows of {largest.data.sequence_length:,} at once"
            raise UserError(
                f"out of memory before the first step, with {shape}. {advice(run, vocab_size, hardware)}"
            ) from error
    engine.forget_moments()
    return plan.need(plan.configured).total


def _take_step(engine: Engine, config: RunConfig, vocab_size: int) -> None:
    """Take a step of at most two micro-batches: what accumulation needs is there from the second on."""
    rows, micro_batches = config.training.micro_batch_size, min(accumulation_steps(config, engine.world_size), 2)
    batch_size = micro_batches * rows * config.parallel.data_ranks(engine.world_size)
    training = config.training.model_copy(update={"batch_size": batch_size})
    engine.enter_phase(config.model_copy(update={"training": training}))
    engine.set_learning_rate(0.0)
    batch = largest_batch(config, rows, vocab_size)
    for _ in range(micro_batches):
        losses, _ = engine.forward(*engine.place(batch))
        engine.backward(losses.sum() / batch.num_masked)
        del losses
        engine.step()


def largest_batch(config: RunConfig, rows: int, vocab_size: int) -> Batch:
    """Return full rows with as many positions to predict as there may be; packed rows hold two documents."""
    length, rate = config.data.sequence_length, config.data.largest_mask_rate
    columns = torch.arange(length).expand(rows, length)
    first = length // 2 if config.data.packing != "padded" else length
    # Masked positions are spread evenly, and no fewer than the rate says.
    masked = (columns * rate).floor() < ((columns + 1) * rate).floor()
    masked[:, -1] = True
    ids = columns % vocab_size
    return Batch(
        input_ids=ids,
        labels=torch.where(masked, ids, IGNORED),
        document_ids=1 + (columns >= first).long(),
        position_ids=torch.where(columns >= first, columns - first, columns),
    )


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error is that of an allocator, on a GPU or a CPU."""
    allocators = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(name in str(error) for name in allocators)
