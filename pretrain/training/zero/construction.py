"""The model before the engine has it: built, sharded and compiled."""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from pretrain.config.run import RunConfig
from pretrain.model.encoder import Block, Encoder, MaskedLanguageModel
from pretrain.training.zero.settings import ZERO_STAGE, deepspeed_config, resolve_precision

M_MMAP_THRESHOLD = -3
"""Option of glibc's mallopt: blocks from so many bytes on are mapped one by one."""


def compile_blocks(encoder: Encoder, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile each block before and after its attention, for any number of rows and positions.

    Attention is left out: its kernels are compiled already, and what they are given differs between batches in more
    than length. Blocks share what is compiled, and the names of parameters stay as they are. The first shape is
    compiled as it is; if another comes, once more for any number of rows or positions, widths staying constants.
    """
    # Rotary or not, one row or several, one table or one a row, training or not: more than torch's 8 variants.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for block in encoder.blocks:
        assert isinstance(block, Block)
        for part in ("before_attention", "after_attention"):
            setattr(block, part, torch.compile(getattr(block, part), backend=backend))


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this kind of device, which takes seconds and hundreds of megabytes."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    import deepspeed
    from deepspeed.runtime import compiler

    # Its own Muon, which no run uses but every engine imports, would load torch's compiler: three seconds.
    with suppress(ImportError, AttributeError), patch.object(compiler, "compile", lambda: lambda function: function):
        import deepspeed.runtime.zero.muon.original_muon
    # An all-reduce for inference only: it would be compiled at the first start, and hold shared memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def return_freed_memory() -> None:
    """Let this process give large blocks back as soon as they are freed, where its C library is glibc.

    It keeps blocks below a threshold for itself, and raises this up to 32 MiB as they are freed: about the size of a
    parameter. Ranks that build, gather and free many of them would hold a second model of such blocks.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)


def build_model(config: RunConfig, vocab_size: int, world_size: int, device: torch.device) -> MaskedLanguageModel:
    """The model with its initial weights, the same for every sharding; collective.

    Under `sharding: full` or `hybrid` a parameter is spread over the ranks as soon as it is made, so that no rank ever
    holds more of the model than its part and the module at hand.
    """
    if ZERO_STAGE[config.training.sharding] < 3:
        return MaskedLanguageModel(config.model, vocab_size)
    deepspeed = load_deepspeed(device)
    deepspeed.init_distributed(dist_init_required=False)
    return_freed_memory()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MaskedLanguageModel(config.model, vocab_size).parameters())
    settings = deepspeed_config(config, world_size, resolve_precision(config), parameters)
    whole = partial(deepspeed.zero.GatheredParameters, modifier_rank=0)
    # Its own linear layer, by default, computes otherwise than torch's.
    with deepspeed.zero.Init(config_dict_or_path=settings, mem_efficient_linear=False):
        return MaskedLanguageModel(config.model, vocab_size, whole)
