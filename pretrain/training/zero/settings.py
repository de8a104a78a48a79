"""Each setting of ours decoded once, for the engine and for the plan, and DeepSpeed's dict made of them.

A user never writes a DeepSpeed config.
"""

import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pretrain.config.run import RunConfig

ZERO_STAGE = {"none": 0, "optimizer": 1, "gradients": 2, "full": 3, "hybrid": 3}
COMPUTE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Type in which matrices are multiplied, by the precision of the run."""


def resolve_precision(config: RunConfig, native_bf16: bool | None = None) -> Literal["fp32", "bf16"]:
    """Return what `auto` means where matrices in bf16 are multiplied natively, or not; by default, on this machine."""
    if config.training.precision != "auto":
        return config.training.precision
    if native_bf16 is None:
        native_bf16 = multiplies_bf16()
    return "bf16" if native_bf16 else "fp32"


def multiplies_bf16() -> bool:
    """Return whether this machine's GPU, or else its processor, multiplies matrices in bf16 natively."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def arithmetic(precision: str, stage: int) -> Literal["fp32", "autocast", "bf16"]:
    """Return what weights and the residual stream are in, and what matrices are multiplied in.

    Both in `fp32` or `bf16`; or, with bf16 at stage 0, weights in fp32 and products in bf16 by autocast, as plain
    data-parallel training does. DeepSpeed's own bf16 at stage 0 keeps no fp32 master weights.
    """
    if precision == "fp32":
        return "fp32"
    return "bf16" if stage > 0 else "autocast"


def checkpoint_every(config: RunConfig) -> int:
    """Return k where every k-th block is computed again in the backward pass; 0 for none."""
    choice = config.training.activation_checkpointing
    return {"none": 0, "full": 1}[choice] if isinstance(choice, str) else choice


def compiles(config: RunConfig, on_gpu: bool) -> bool:
    """Return whether the blocks are compiled."""
    choice = config.training.compile
    return on_gpu if choice == "auto" else choice == "on"


def overlaps(config: RunConfig) -> bool:
    """Return whether gradients are summed over ranks while the backward pass still runs."""
    choice = config.training.overlap_communication
    return ZERO_STAGE[config.training.sharding] == 3 if choice == "auto" else choice == "on"


def rows_per_rank(config: RunConfig, world_size: int) -> int:
    """Return the rows of one rank in a step; of the ranks that share rows, those of all of them together."""
    return math.ceil(config.training.batch_size / config.parallel.data_ranks(world_size))


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Return the micro-batches of a rank in a step."""
    return math.ceil(rows_per_rank(config, world_size) / config.training.micro_batch_size)


def ranks_per_node(world_size: int) -> int:
    """Return how many ranks share a node with this one, as the launcher says; without a launcher, all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def deepspeed_config(config: RunConfig, world_size: int, precision: str, parameters: int) -> dict[str, Any]:
    """Return DeepSpeed's dict, derived from our config.

    Batch sizes in it only tell DeepSpeed how many micro-batches a step has: it never sees the rows. Unsharded runs
    are clipped by `Engine.step` itself. Buckets are sized by the number of parameters.
    """
    micro_batches = accumulation_steps(config, world_size)
    stage = ZERO_STAGE[config.training.sharding]
    buckets = Buckets.of(parameters)
    return {
        "train_batch_size": micro_batches * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": buckets.reduced,
            "allgather_bucket_size": buckets.reduced,
            "stage3_prefetch_bucket_size": buckets.prefetched,
            "stage3_max_live_parameters": buckets.live,
            "stage3_max_reuse_distance": buckets.live,
            "zero_hpz_partition_size": ranks_per_node(world_size) if config.training.sharding == "hybrid" else 1,
            "stage3_param_persistence_threshold": buckets.persistent,
            "overlap_comm": overlaps(config),
            # For DeepSpeed `nvme` is the host too: `Engine` itself puts tensors into files.
            "offload_optimizer": {
                "device": "none" if config.training.offload == "none" else "cpu",
                "pin_memory": torch.cuda.is_available(),
            },
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32" if config.training.reduce_dtype == "fp32" else None,
        "bf16": {"enabled": arithmetic(precision, stage) == "bf16", "check_grad_overflow": True},
        "gradient_clipping": config.optimizer.clip_grad_norm if stage > 0 else 0.0,
        "steps_per_print": 2**31,
    }


@dataclass(frozen=True)
class Buckets:
    """Elements that ZeRO reduces or gathers at once: parts of the model, up to what serves the largest models.

    DeepSpeed's own sizes are constants for models of billions: a smaller one would be gathered whole.
    """

    reduced: int
    """Size of the buffer in which gradients are reduced (DeepSpeed's reduce_bucket_size), an even number; a larger
    gradient goes alone."""
    live: int
    """Most of gathered parameters that stage 3 may hold (max_live_parameters, and max_reuse_distance with it)."""
    prefetched: int
    """Most of the parameters that stage 3 gathers ahead of their use (prefetch_bucket_size)."""
    persistent: int
    """Size up to which a parameter stays whole on every rank (param_persistence_threshold): norms."""

    @classmethod
    def of(cls, parameters: int) -> "Buckets":
        """Return the sizes for a model of so many parameters."""
        return cls(
            reduced=min(parameters // 16 * 2, 500_000_000),
            live=min(parameters // 8, 1_000_000_000),
            prefetched=min(parameters // 16, 50_000_000),
            persistent=min(parameters // 10_000, 100_000),
        )
