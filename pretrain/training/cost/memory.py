"""Bytes of model states under ZeRO: weights, gradients, optimizer states, buffers. Pure arithmetic over tensor sizes.

What DeepSpeed 0.19 allocates, tensor by tensor (a test compares with a real engine on 1, 2 and 4 ranks at every
stage). W is the number of ranks, c the bytes of an element of the weights that the model computes with.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.config.run import RunConfig
from pretrain.training.zero.settings import ZERO_STAGE, Buckets, accumulation_steps, arithmetic, overlaps

FP32 = 4
UNSHARDED_BUCKET = 500_000_000
"""Elements that are reduced at once without sharding (DeepSpeed's constant for it)."""
SUB_GROUP = 1_000_000_000
"""Elements that stage 3 updates at once (sub_group_size)."""
Groups = Sequence[Sequence[int]]
"""Elements of each parameter, in order, for each group of the optimizer."""
Moments = Sequence[int]
"""Values that the optimizer keeps for an element (AdamW two, Muon one), for each of its groups."""


@dataclass(frozen=True)
class Spread:
    """How the states of a run are spread over its ranks."""

    stage: int
    world_size: int
    precision: str
    """`fp32` or `bf16`."""
    micro_batches: int
    """Micro-batches of a rank in a step."""
    offload: str = "none"
    """Value of `training.offload`; at stage 0 none but `none`."""
    reduce_in_fp32: bool = False
    overlap: bool = False
    """Stages 1 and 2 reduce gradients in two buckets by turns."""

    @classmethod
    def of(cls, config: RunConfig, world_size: int, precision: str) -> "Spread":
        """Return what a config says."""
        training = config.training
        return cls(
            stage=ZERO_STAGE[training.sharding],
            world_size=world_size,
            precision=precision,
            micro_batches=accumulation_steps(config, world_size),
            offload=training.offload,
            reduce_in_fp32=training.reduce_dtype == "fp32",
            overlap=overlaps(config),
        )

    @property
    def weight_bytes(self) -> int:
        """c."""
        return 2 if arithmetic(self.precision, self.stage) == "bf16" else FP32


@dataclass(frozen=True)
class ModelStates:
    """Bytes on the rank that holds most."""

    weights: int
    """What the model computes with, and the fp32 master weights where they are others."""
    gradients: int
    """What is kept from one micro-batch of a step to the next."""
    optimizer: int
    """Moments and step counters."""
    host: int = 0
    """What `offload` has put into the host's memory: it is in none of the others."""
    files: int = 0
    """What `offload: nvme` has put into files instead."""

    @property
    def total(self) -> int:
        """Bytes of the device."""
        return self.weights + self.gradients + self.optimizer


def model_states(groups: Groups, moments: Moments, spread: Spread) -> ModelStates:
    """Return the states of one rank.

    With `offload` master weights, moments and gradients in fp32 for the update are on the host, as are the gradients of
    stages 2 and 3 between micro-batches; stages 1 and 2 copy weights and gradients there through buffers. With `nvme`
    the moments, and at stage 3 the master weights, are in files.
    """
    elements, stage, c = sum(map(sum, groups)), spread.stage, spread.weight_bytes
    if stage == 0:
        counters = FP32 * sum(map(len, groups))
        return ModelStates(FP32 * elements, FP32 * elements, FP32 * _kept(map(sum, groups), moments) + counters)
    if stage == 3:
        held = [sum(math.ceil(numel / spread.world_size) for numel in group) for group in groups]
        weights, gradients = sum(held) + _whole_on_every_rank(groups, spread.world_size), sum(held)
    else:
        flat = [_flat(group, spread.world_size) for group in groups]
        held, weights = [numel // spread.world_size for numel in flat], sum(flat)
        whole_gradients = stage == 1 and spread.micro_batches > 1
        gradients = elements if whole_gradients else gradient_partition(groups, spread.world_size)
    own, optimizer, counters = sum(held), FP32 * _kept(held, moments), FP32 * len(groups)
    if spread.offload == "none":
        return ModelStates(c * weights + FP32 * own, c * gradients, optimizer + counters)
    on_host = (2 * FP32 + c) * own + optimizer + counters
    in_files = (optimizer + (FP32 * own if stage == 3 else 0)) if spread.offload == "nvme" else 0
    if stage == 3:
        return ModelStates(c * weights, 0, 0, on_host - in_files, in_files)
    buffer = c * max(map(max, groups))
    on_host += buffer + (c * gradients if stage == 2 else 0)
    return ModelStates(c * weights + buffer, c * elements if stage == 1 else 0, 0, on_host - in_files, in_files)


def _whole_on_every_rank(groups: Groups, world_size: int) -> int:
    """Elements of the small parameters that stage 3 keeps gathered; on one rank there is nothing to gather."""
    limit = Buckets.of(sum(map(sum, groups))).persistent
    return sum(numel for group in groups for numel in group if numel <= limit) if world_size > 1 else 0


def _kept(elements: Iterable[int], moments: Moments) -> int:
    """Values of all moments, of so many elements of each group."""
    return sum(number * each for number, each in zip(elements, moments, strict=True))


def _flat(group: Sequence[int], world_size: int) -> int:
    """Elements of a group laid end to end, padded so that every rank's part is a multiple of two."""
    return math.ceil(sum(group) / (2 * world_size)) * 2 * world_size


def gradient_partition(groups: Groups, world_size: int) -> int:
    """Elements of the gradients that stages 1 and 2 keep, on the rank that has most.

    A parameter that crosses the border between two ranks' parts is kept whole by both.
    """
    own = np.zeros(world_size + 1, dtype=np.int64)
    for group in groups:
        part, start = _flat(group, world_size) // world_size, 0
        for numel in group:
            own[start // part] += numel
            own[(start + numel - 1) // part + 1] -= numel
            start += numel
    return int(np.cumsum(own)[:world_size].max())


@dataclass(frozen=True)
class Buffers:
    """Bytes beside the states, on one rank."""

    communication: int
    """Buffers in which gradients are reduced and, at stage 3, parameters gathered."""
    update: int
    """Gradients in fp32 while the optimizer moves, when activations are gone."""


def buffers(groups: Groups, spread: Spread) -> Buffers:
    """Return the buffers of one rank."""
    elements, stage, world_size, c = sum(map(sum, groups)), spread.stage, spread.world_size, spread.weight_bytes
    if stage == 0:
        # Without sharding DeepSpeed flattens gradients into a bucket of their own where there are ranks to sum over.
        return Buffers(FP32 * min(elements, UNSHARDED_BUCKET) if world_size > 1 else 0, 0)
    sizes, largest, on_host = Buckets.of(elements), max(map(max, groups)), spread.offload != "none"
    bucket = max(sizes.reduced, largest)
    # A copy of a bucket, summed in place of it.
    copied = FP32 * bucket if spread.reduce_in_fp32 and c < FP32 else 0
    own = sum(_flat(group, world_size) for group in groups) // world_size
    if stage == 3:
        gathered = sizes.live + sizes.prefetched + largest if world_size > 1 else 0
        return Buffers(c * (bucket + min(gathered, elements)) + copied, 0 if on_host else FP32 * min(own, SUB_GROUP))
    # From the second micro-batch on, its gradients are beside those that it is added to; offloaded ones go at once.
    beside = stage == 2 and spread.micro_batches > 1 and not on_host
    arriving = gradient_partition(groups, world_size) if beside else 0
    buckets = bucket * (2 if spread.overlap else 1)
    return Buffers(c * (buckets + arriving) + copied, FP32 * own if c < FP32 and not on_host else 0)
