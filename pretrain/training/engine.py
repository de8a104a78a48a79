"""Our config -> DeepSpeed's dict -> engine. The only file that imports DeepSpeed's engine.

A user never writes a DeepSpeed config. ZeRO divides gradients by the number of ranks; the step's own arithmetic
(loss summed, divided once by all masked tokens) therefore scales the loss up by it, see step.py.
"""

import ctypes
import logging
import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config import RunConfig
from pretrain.model.encoder import Block, Encoder, MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.model.sequence_parallel import SequenceGroup
from pretrain.training.file_tensors import TensorFiles
from pretrain.training.fragments import fragments
from pretrain.training.memory import Buckets
from pretrain.training.muon import Muon, Piece, initial_state
from pretrain.training.optimizer import build_optimizer, summarize_groups, whole_shape

log = logging.getLogger(__name__)

ZERO_STAGE = {"none": 0, "optimizer": 1, "gradients": 2, "full": 3, "hybrid": 3}
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What matrices are made orthogonal in, by the precision of the run."""
M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: blocks from so many bytes on are mapped one by one."""


def resolve_precision(config: RunConfig) -> str:
    """`fp32` or `bf16`: what `auto` means on this machine."""
    if config.training.precision != "auto":
        return config.training.precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
    return "bf16" if native else "fp32"


def checkpoint_every(config: RunConfig) -> int:
    """Every how many blocks one is computed again in the backward pass; 0 for none."""
    choice = config.training.activation_checkpointing
    return {"none": 0, "full": 1}[choice] if isinstance(choice, str) else choice


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether the blocks are compiled: what `auto` means on this device."""
    choice = config.training.compile
    return device.type == "cuda" if choice == "auto" else choice == "on"


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


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro-batches per rank and step."""
    _, readers = config.parallel.reader(0, world_size)
    return math.ceil(config.training.batch_size / readers / config.training.micro_batch_size)


def ranks_per_node(world_size: int) -> int:
    """That share a node with this one, as the launcher says; without a launcher, all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def deepspeed_config(config: RunConfig, world_size: int, precision: str, parameters: int) -> dict[str, Any]:
    """DeepSpeed's dict, derived from ours.

    Batch sizes in it only tell DeepSpeed how many micro-batches a step has: it never sees the rows. Unsharded runs
    are clipped by `Engine.step` itself, and compute in bf16 by autocast over fp32 weights, as plain data-parallel
    training does; DeepSpeed's own bf16 at stage 0 keeps no fp32 master weights. Buckets are sized by the number of
    parameters.
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
            "overlap_comm": {"auto": stage == 3, "on": True, "off": False}[config.training.overlap_communication],
            # For DeepSpeed `nvme` is the host too: `Engine` itself puts tensors into files.
            "offload_optimizer": {
                "device": "none" if config.training.offload == "none" else "cpu",
                "pin_memory": torch.cuda.is_available(),
            },
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32" if config.training.reduce_dtype == "fp32" else None,
        "bf16": {"enabled": precision == "bf16" and stage > 0, "check_grad_overflow": True},
        "gradient_clipping": config.optimizer.clip_grad_norm if stage > 0 else 0.0,
        "steps_per_print": 2**31,
    }


def load_deepspeed(device: torch.device) -> Any:
    """Import it for this kind of device, which takes seconds and hundreds of megabytes."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    import deepspeed

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


class Engine:
    """A model under ZeRO: forward, backward, and a step that does nothing when the gradients are not finite."""

    def __init__(self, model: MaskedLanguageModel, config: RunConfig, world_size: int, device: torch.device) -> None:
        deepspeed = load_deepspeed(device)
        self.device, self.config = device, config
        self.sequence = SequenceGroup.join(config.parallel.sequence, timedelta(seconds=config.supervision.collective_s))
        """The ranks that this one shares its rows with, if it does."""
        self.stage = ZERO_STAGE[config.training.sharding]
        self.precision = resolve_precision(config)
        self._encoder = model.encoder
        self._encoder.checkpoint_every = checkpoint_every(config)
        if compiles(config, device):
            compile_blocks(self._encoder)
        self.parameter_shapes = {name: whole_shape(p) for name, p in model.named_parameters()}
        optimizer = build_optimizer(model, config.optimizer, COMPUTE[self.precision])
        for summary in summarize_groups(optimizer.param_groups, config.optimizer.learning_rate):
            log.info("optimizer: %s", summary)
        parameters = sum(map(math.prod, self.parameter_shapes.values()))
        moments = {id(p): group["moments"] for group in optimizer.param_groups for p in group["params"]}
        self.moments: dict[str, tuple[str, ...]] = {name: moments[id(p)] for name, p in model.named_parameters()}
        """By parameter, the names of what the optimizer keeps for each of its elements."""
        self._deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, world_size, self.precision, parameters),
            dist_init_required=False,
        )
        # Alone there is nobody to sum with, but without sharding DeepSpeed copies all gradients as if there were.
        self._deepspeed.enable_backward_allreduce = self.stage > 0 or world_size > 1
        self.module: Any = self._deepspeed.module
        assert self.torch_optimizer is optimizer, "DeepSpeed has replaced the optimizer"
        self.files: TensorFiles | None = None
        """Where `offload: nvme` keeps moments and, at stage 3, master weights; DeepSpeed has views of those of stages 1
        and 2, which would stay where they are."""
        if config.training.offload == "nvme" and config.training.offload_folder is not None:
            self.files = TensorFiles(config.training.offload_folder)
            for _, parameter in self.flat_parameters() if self.stage == 3 else ():
                parameter.data = self.files.copy_of(parameter)
        zeros_like = torch.zeros_like if self.files is None else self.files.zeros_like
        for group, parameter in self.flat_parameters():
            optimizer.state[parameter].update(initial_state(parameter, group["moments"], zeros_like))
        if self.stage in (1, 2):
            self.zero._lazy_init_hp_params_optimizer_state()
        if self.stage > 0 and isinstance(optimizer, Muon):
            self._give_pieces(optimizer)

    @property
    def zero(self) -> Any:
        """DeepSpeed's optimizer (a plain torch one without sharding)."""
        return self._deepspeed.optimizer

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that does the arithmetic, inside ZeRO's."""
        return self.zero if self.stage == 0 else self.zero.optimizer

    def flat_parameters(self) -> list[tuple[dict[str, Any], Tensor]]:
        """The tensors that the torch optimizer's state is keyed by, each with its group."""
        groups = self.torch_optimizer.param_groups
        if self.stage == 0:
            return [(group, p) for group in groups for p in group["params"]]
        if self.stage < 3:
            return list(zip(groups, self.zero.single_partition_of_fp32_groups, strict=True))
        flat = self.zero.fp32_partitioned_groups_flat
        return [(groups[self.zero.sub_group_to_group_id[number]], tensor) for number, tensor in enumerate(flat)]

    def _give_pieces(self, optimizer: Muon) -> None:
        """Tell Muon where in ZeRO's flat tensors its matrices lie, on all ranks; collective."""
        flat = [tensor for _, tensor in self.flat_parameters()]
        own: list[list[Piece]] = [[] for _ in flat]
        for fragment in fragments(self):
            if fragment.kind == "weight":
                number, offset = place_in(fragment.tensor, flat)
                own[number].append(Piece(fragment.parameter, fragment.start, fragment.tensor.numel(), offset))
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        pieces = [own] * world_size
        if world_size > 1:
            dist.all_gather_object(pieces, own)
        optimizer.take_pieces(flat, pieces, rank)

    @property
    def collectives(self) -> Any:
        """DeepSpeed's communication backend: an object with a method for each collective."""
        from deepspeed.comm import comm

        return comm.cdb

    def place(self, batch: Batch) -> tuple[Batch, AttentionLayout]:
        """Rows of this rank, on its device, with their layout: the part of them that it holds of shared rows."""
        layout = AttentionLayout.from_batch(batch)
        if self.sequence is not None:
            batch, layout = self.sequence.own_positions(batch), layout.over(self.sequence)
        return batch.to(self.device), layout.to(self.device)

    def forward(self, batch: Batch, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
        """`MaskedLanguageModel.forward`, sharded and in the run's precision."""
        autocast = self.stage == 0 and self.precision == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if autocast else nullcontext():
            return self._deepspeed(batch, layout)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`; its scale is the caller's business."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """After each backward. After a step's last one the optimizer moves, unless a gradient is not finite."""
        if self.stage == 0 and self._deepspeed.is_gradient_accumulation_boundary():
            limit = self.config.optimizer.clip_grad_norm
            self._norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit))
            if not math.isfinite(self._norm):
                self._deepspeed.zero_grad()
        self._deepspeed.step()

    def enter_phase(self, config: RunConfig, world_size: int) -> None:
        """Go on with the batch size and the rotary base of `config`; weights and moments stay."""
        self.config = config
        self._deepspeed.set_train_batch_size(accumulation_steps(config, world_size) * world_size)
        # DeepSpeed counts micro-batches since its start, and takes every n-th as the last of a step.
        self._deepspeed.micro_steps = 0
        theta = config.model.rotary_theta
        self._encoder.rotary_theta = None if theta == self._encoder.config.rotary_theta else theta

    def see_tokens(self, tokens_seen: int) -> None:
        """Tell the encoder how many tokens the run has seen: some configs drop positions after so many."""
        self._encoder.see_tokens(tokens_seen)

    def train(self) -> None:
        """Gradients will be wanted."""
        self._deepspeed.train()

    def eval(self) -> None:
        """No gradients will be wanted."""
        self._deepspeed.eval()

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step before clipping; not finite if the step was skipped."""
        if self.stage == 0:
            return self._norm
        return float(self._deepspeed.get_global_grad_norm()) if self._deepspeed.was_step_applied() else math.nan

    def set_learning_rate(self, learning_rate: float) -> None:
        """For the next step, in every group times the group's own factor."""
        for group in self.zero.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]

    def set_optimizer_steps(self, steps: int) -> None:
        """The optimizer's own step count, which AdamW's bias correction needs."""
        for _, parameter in self.flat_parameters():
            self.torch_optimizer.state[parameter]["step"].fill_(steps)

    def forget_moments(self) -> None:
        """Start the optimizer over: no steps, and moments of zero."""
        for state in self.torch_optimizer.state.values():
            for value in state.values():
                value.zero_()

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimizer took: skipped ones are not among them."""
        return int(self.torch_optimizer.state[self.flat_parameters()[0][1]]["step"])

    def refresh_weights(self) -> None:
        """Make the weights that the model computes with those of the fp32 master, on all ranks."""
        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            for index, master in enumerate(self.zero.fp32_partitioned_groups_flat):
                self.zero.fp16_partitioned_groups_flat[index].data.copy_(master.data)
                self.zero._unflatten_partitioned_parameters(index)
            persistent = self.zero.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)


def place_in(view: Tensor, flat: list[Tensor]) -> tuple[int, int]:
    """In which of the flat tensors a view of one begins, and where."""
    for number, tensor in enumerate(flat):
        offset = int(view.storage_offset() - tensor.storage_offset())
        shared = view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        if shared and 0 <= offset < tensor.numel():
            return number, offset
    raise AssertionError("a fragment of a parameter is in none of ZeRO's flat tensors")


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
