"""Memory that one config needs on some hardware, put together from `memory.py` and `activations.py`."""

import math
from dataclasses import dataclass, replace

import torch

from pretrain.config.model import ModelConfig
from pretrain.config.run import RunConfig
from pretrain.config.training import OptimizerConfig
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.training.cost.activations import PACKING_OVERHEAD, Activations, ForwardPass, activations
from pretrain.training.cost.hardware import Hardware
from pretrain.training.cost.memory import FP32, Buffers, ModelStates, Spread, buffers, model_states
from pretrain.training.zero.muon import working_bytes
from pretrain.training.zero.optimizer import GroupSummary, parameter_groups, summarize_groups
from pretrain.training.zero.settings import (
    COMPUTE_DTYPE,
    checkpoint_every,
    compiles,
    resolve_precision,
    rows_per_rank,
)


@dataclass(frozen=True)
class OptimizerShape:
    """What the optimizer's groups hold, in order."""

    sizes: list[list[int]]
    """Elements of every parameter."""
    moments: list[int]
    """Values that are kept for each element."""
    largest: int
    """Elements of the largest matrix that Muon moves; 0 for AdamW."""
    orthogonal: int
    """Elements of all matrices that Muon moves."""
    summaries: list[GroupSummary]

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(map(sum, self.sizes))

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes on disk from all ranks together: weights and moments in fp32; names and JSON come on top."""
        return FP32 * sum(sum(sizes) * (1 + kept) for sizes, kept in zip(self.sizes, self.moments, strict=True))


def optimizer_shape(model: ModelConfig, vocab_size: int, optimizer: OptimizerConfig) -> OptimizerShape:
    """Return the shape of the real module's optimizer, built on the meta device."""
    with torch.device("meta"):
        groups = parameter_groups(MaskedLanguageModel(model, vocab_size), optimizer)
    matrices = [matrix.numel for group in groups for matrix in group.get("matrices", ())]
    return OptimizerShape(
        sizes=[[parameter.numel() for parameter in group["params"]] for group in groups],
        moments=[len(group["moments"]) for group in groups],
        largest=max(matrices, default=0),
        orthogonal=sum(matrices),
        summaries=summarize_groups(groups, optimizer.learning_rate),
    )


@dataclass(frozen=True)
class Need:
    """Bytes of the rank that needs most."""

    states: ModelStates
    buffers: Buffers
    activations: Activations
    on_gpu: bool
    saved: int
    """The copy from which a save in the background is written, on the average rank."""

    @property
    def host(self) -> int:
        """Bytes of the host's memory, beside what the device holds."""
        return self.states.host + self.saved

    @property
    def total(self) -> int:
        """Bytes at the peak: while gradients flow, or while the optimizer moves and activations are gone.

        Those of the device; where that is the host, with all that is there.
        """
        own = self.states.total + (0 if self.on_gpu else self.host)
        return own + max(self.buffers.communication + self.activations.peak, self.buffers.update)


def planned_precision(config: RunConfig, hardware: Hardware) -> str:
    """Return `fp32` or `bf16`; `auto` is bf16 on a GPU, and what this machine's own is on a processor."""
    return resolve_precision(config, True if hardware.on_gpu else None)


def forward_pass(config: RunConfig, vocab_size: int, hardware: Hardware) -> ForwardPass:
    """Return what goes through the model at once on one rank."""
    data, sequence = config.data, config.parallel.sequence
    precision = planned_precision(config, hardware)
    rows = min(config.training.micro_batch_size, rows_per_rank(config, hardware.world_size))
    return ForwardPass(
        model=config.model,
        vocab_size=vocab_size,
        rows=rows,
        length=data.sequence_length,
        masked=math.ceil(data.largest_mask_rate * rows * data.sequence_length / sequence),
        compute_bytes=COMPUTE_DTYPE[precision].itemsize,
        residual_bytes=Spread.of(config, hardware.world_size, precision).weight_bytes,
        checkpoint_every=checkpoint_every(config),
        compiled=compiles(config, hardware.on_gpu),
        on_gpu=hardware.on_gpu,
        packed=data.packing != "padded",
        packing_overhead=PACKING_OVERHEAD,
        sequence=sequence,
    )


def memory_need(config: RunConfig, vocab_size: int, optimizer: OptimizerShape, hardware: Hardware) -> Need:
    """Return what a config needs; of its phases, only the first is looked at."""
    world_size, precision = hardware.world_size, planned_precision(config, hardware)
    spread = Spread.of(config, world_size, precision)
    beside = buffers(optimizer.sizes, spread)
    if optimizer.largest:
        # Stages 1 and 2 cut at most one matrix between two ranks; stage 3 cuts all of them.
        cut = optimizer.orthogonal if spread.stage == 3 else optimizer.largest
        shared = 0 if spread.stage == 0 or world_size == 1 else cut
        muon = working_bytes(optimizer.largest, shared, COMPUTE_DTYPE[precision].itemsize)
        beside = replace(beside, update=beside.update + muon)
    states = model_states(optimizer.sizes, optimizer.moments, spread)
    if config.training.sharding == "hybrid":
        again = spread.weight_bytes * math.ceil(optimizer.parameters / hardware.ranks_per_node)
        states = replace(states, weights=states.weights + again)
    copied = config.checkpoint.background and spread.offload != "nvme"
    return Need(
        states=states,
        buffers=beside,
        activations=activations(forward_pass(config, vocab_size, hardware)),
        on_gpu=hardware.on_gpu,
        saved=math.ceil(optimizer.checkpoint_bytes / world_size) if copied else 0,
    )


def sent_for_attention(config: RunConfig, hardware: Hardware) -> int:
    """Return the bytes that a rank sends in a step to those that it shares rows with: positions for heads, and back."""
    model, size, every = config.model, config.parallel.sequence, checkpoint_every(config)
    positions = rows_per_rank(config, hardware.world_size) * config.data.sequence_length / size
    # q, k, v and what attention made of them, forwards, backwards, and where a block is computed again
    tensors = 4 * (2 + (1 / every if every else 0.0)) * model.num_layers
    c = COMPUTE_DTYPE[planned_precision(config, hardware)].itemsize
    return round(tensors * c * model.attention_size * positions * (size - 1) / size)
