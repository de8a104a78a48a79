"""Bytes of model states under ZeRO: weights, gradients, optimizer states, buffers. Pure arithmetic over tensor sizes.

What DeepSpeed 0.19 allocates, tensor by tensor (a test compares with a real engine on 1, 2 and 4 ranks at every
stage). W is the number of ranks, c the bytes of an element of the weights that the model computes with.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.training.zero.settings import Buckets

FP32 = 4


UNSHARDED_BUCKET = 500_000_000
"""Elements that are reduced at once without sharding (DeepSpeed's constant for it)."""


SUB_GROUP = 1_000_000_000
"""Elements that stage 3 updates at once (sub_group_size)."""


Groups = Sequence[Sequence[int]]
"""Of each group of the optimizer, the number of elements of each of its parameters, in order."""


Moments = Sequence[int]
"""Of each group, how many values the optimizer keeps for an element: AdamW two, Muon one."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes on the rank that holds most."""

    weights: int
    """What the model computes with, and the fp32 master weights where they are others."""
    gradients: int
    """Between two micro-batches of a step."""
    optimizer: int
    """Moments and step counters."""
    host: int = 0
    """What `offload` has put into the host's memory: it is in none of the others."""
    files: int = 0
    """What `offload: nvme` has put into files instead."""

    @property
    def total(self) -> int:
        """Of the device."""
        return self.weights + self.gradients + self.optimizer


def compute_bytes(stage: int, precision: str) -> int:
    """c: without sharding bf16 is autocast over fp32 weights."""
    return 2 if precision == "bf16" and stage > 0 else FP32


def model_states(
    groups: Groups,
    moments: Moments,
    stage: int,
    world_size: int,
    precision: str,
    accumulation: int,
    offload: str = "none",
) -> ModelStates:
    """Of one rank at ZeRO `stage`; `accumulation` is the number of micro-batches in a step.

    With `offload` (stages 1 to 3) master weights, moments and gradients in fp32 for the update are on the host, as are
    the gradients of stages 2 and 3 between micro-batches; stages 1 and 2 copy weights and gradients there through
    buffers. With `nvme` the moments, and at stage 3 the master weights, are in files.
    """
    c = compute_bytes(stage, precision)
    elements = sum(map(sum, groups))
    if stage == 0:
        counters = FP32 * sum(map(len, groups))
        return ModelStates(FP32 * elements, FP32 * elements, FP32 * _kept(map(sum, groups), moments) + counters)
    counters = FP32 * len(groups)
    if stage == 3:
        held = [sum(math.ceil(numel / world_size) for numel in group) for group in groups]
        own = sum(held)
        # On one rank a partition is the whole parameter, and nothing needs to be gathered.
        whole = Buckets.of(elements).persistent
        kept = sum(n for group in groups for n in group if n <= whole) if world_size > 1 else 0
        moments_bytes = FP32 * _kept(held, moments)
        if offload != "none":
            files = moments_bytes + FP32 * own if offload == "nvme" else 0
            host = (2 * FP32 + c) * own + moments_bytes + counters - files
            return ModelStates(c * (own + kept), 0, 0, host, files)
        return ModelStates((c + FP32) * own + c * kept, c * own, moments_bytes + counters)
    flat = [_flat(group, world_size) for group in groups]
    own = sum(flat) // world_size
    whole_gradients = stage == 1 and accumulation > 1
    gradients = elements if whole_gradients else gradient_partition(groups, world_size)
    moments_bytes = FP32 * _kept((elements // world_size for elements in flat), moments)
    if offload != "none":
        largest, files = c * max(map(max, groups)), moments_bytes if offload == "nvme" else 0
        host = (2 * FP32 + c) * own + moments_bytes + counters + largest + (0 if stage == 1 else c * gradients) - files
        return ModelStates(c * sum(flat) + largest, c * elements if stage == 1 else 0, 0, host, files)
    return ModelStates(c * sum(flat) + FP32 * own, c * gradients, moments_bytes + counters)


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
    """In which gradients are reduced and, at stage 3, parameters gathered."""
    update: int
    """While the optimizer moves, when activations are gone: gradients in fp32."""


def buffers(
    groups: Groups,
    stage: int,
    world_size: int,
    precision: str,
    accumulation: int,
    reduce_in_fp32: bool,
    overlap: bool = False,
    offload: bool = False,
) -> Buffers:
    """Of one rank; see `model_states`. `overlap` are two buckets by turns, at stages 1 and 2."""
    elements = sum(map(sum, groups))
    sizes = Buckets.of(elements)
    if stage == 0:
        # Without sharding DeepSpeed flattens gradients into a bucket of their own where there are ranks to sum over.
        return Buffers(FP32 * min(elements, UNSHARDED_BUCKET) if world_size > 1 else 0, 0)
    c = compute_bytes(stage, precision)
    largest = max(map(max, groups))
    bucket = max(sizes.reduced, largest)
    # A copy of a bucket, summed in place of it.
    copied = FP32 * bucket if reduce_in_fp32 and c < FP32 else 0
    own = sum(_flat(group, world_size) for group in groups) // world_size
    if stage == 3:
        gathered = sizes.live + sizes.prefetched + largest if world_size > 1 else 0
        update = 0 if offload else FP32 * min(own, SUB_GROUP)
        return Buffers(c * (bucket + min(gathered, elements)) + copied, update)
    # From the second micro-batch on, its gradients are beside those that it is added to; offloaded ones go at once.
    beside = stage == 2 and accumulation > 1 and not offload
    arriving = gradient_partition(groups, world_size) if beside else 0
    buckets = bucket * (2 if overlap else 1)
    return Buffers(c * (buckets + arriving) + copied, FP32 * own if c < FP32 and not offload else 0)


def checkpoint_bytes(groups: Groups, moments: Moments) -> int:
    """On disk, from all ranks together: weights and moments in fp32; names and JSON come on top."""
    return FP32 * (sum(map(sum, groups)) + _kept(map(sum, groups), moments))
