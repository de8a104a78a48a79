"""The engine: a model under DeepSpeed's ZeRO, with forward, backward and step.

ZeRO divides gradients by the number of ranks; the step's own arithmetic (loss summed, divided once by all masked
tokens) therefore scales the loss up by it, see `step.py`. What a rank holds is in `partition.py`.
"""

import logging
import math
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch
from pretrain.config.run import RunConfig
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.model.layout import AttentionLayout
from pretrain.model.sequence_parallel import SequenceGroup
from pretrain.training.zero.construction import compile_blocks, load_deepspeed
from pretrain.training.zero.file_tensors import TensorFiles
from pretrain.training.zero.muon import Muon
from pretrain.training.zero.optimizer import build_optimizer, give_pieces, summarize_groups
from pretrain.training.zero.partition import PARTITIONS, whole_shape
from pretrain.training.zero.settings import (
    COMPUTE_DTYPE,
    ZERO_STAGE,
    accumulation_steps,
    arithmetic,
    checkpoint_every,
    compiles,
    deepspeed_config,
    resolve_precision,
)
from pretrain.training.zero.timed_collectives import OpenSection, time_collectives

log = logging.getLogger(__name__)


class Engine:
    """A model under ZeRO: forward, backward, and a step that does nothing when the gradients are not finite."""

    def __init__(self, model: MaskedLanguageModel, config: RunConfig, world_size: int, device: torch.device) -> None:
        """Collective."""
        deepspeed = load_deepspeed(device)
        self.device, self.config = device, config
        self.rank, self.world_size = dist.get_rank() if dist.is_initialized() else 0, world_size
        self.sequence = SequenceGroup.join(config.parallel.sequence, timedelta(seconds=config.supervision.collective_s))
        """Ranks that this one shares its rows with, if it does."""
        self.precision = resolve_precision(config)
        stage = ZERO_STAGE[config.training.sharding]
        self._sharded = stage > 0
        self.arithmetic = arithmetic(self.precision, stage)
        self._encoder = model.encoder
        self._encoder.checkpoint_every = checkpoint_every(config)
        if compiles(config, device.type == "cuda"):
            compile_blocks(self._encoder)
        self.parameter_shapes = {name: whole_shape(p) for name, p in model.named_parameters()}
        optimizer = build_optimizer(model, config.optimizer, COMPUTE_DTYPE[self.precision])
        for summary in summarize_groups(optimizer.param_groups, config.optimizer.learning_rate):
            log.info("optimizer: %s", summary)
        moments = {id(p): group["moments"] for group in optimizer.param_groups for p in group["params"]}
        self.moments: dict[str, tuple[str, ...]] = {name: moments[id(p)] for name, p in model.named_parameters()}
        """Names of what the optimizer keeps for each element of a parameter, by parameter."""
        parameters = sum(map(math.prod, self.parameter_shapes.values()))
        self._deepspeed, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, world_size, self.precision, parameters),
            dist_init_required=False,
        )
        # Alone there is nobody to sum with, but without sharding DeepSpeed copies all gradients as if there were.
        self._deepspeed.enable_backward_allreduce = self._sharded or world_size > 1
        self.module: Any = self._deepspeed.module
        offloaded = config.training.offload != "none"
        self.partition = PARTITIONS[stage](self.module, self._deepspeed.optimizer, self.moments, offloaded=offloaded)
        """Weights, moments and gradients that this rank holds."""
        assert self.torch_optimizer is optimizer, "DeepSpeed has replaced the optimizer"
        self.files: TensorFiles | None = None
        """Files in which `offload: nvme` keeps moments and, where they may move, master weights."""
        if config.training.offload == "nvme" and config.training.offload_folder is not None:
            self.files = TensorFiles(config.training.offload_folder)
            for weights in self.partition.movable_weights():
                weights.data = self.files.copy_of(weights)
        self.partition.start_moments(torch.zeros_like if self.files is None else self.files.zeros_like)
        if self._sharded and isinstance(optimizer, Muon):
            give_pieces(optimizer, self.partition)

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that does the arithmetic, inside ZeRO's."""
        return self.partition.torch_optimizer

    @property
    def collectives(self) -> Any:
        """DeepSpeed's communication backend: an object with a method for each collective."""
        from deepspeed.comm import comm

        return comm.cdb

    def time_collectives(self, section: OpenSection) -> None:
        """Open `section("communication")` while this rank is in a collective of DeepSpeed, or waits for one."""
        time_collectives(self.collectives, section)

    def place(self, batch: Batch) -> tuple[Batch, AttentionLayout]:
        """Return rows of this rank on its device, with their layout; of rows that ranks share, its part."""
        layout = AttentionLayout.from_batch(batch)
        if self.sequence is not None:
            batch, layout = self.sequence.own_positions(batch), layout.over(self.sequence)
        return batch.to(self.device), layout.to(self.device)

    def forward(self, batch: Batch, layout: AttentionLayout) -> tuple[Tensor, Tensor]:
        """Return what `MaskedLanguageModel.forward` does, sharded and in the run's precision."""
        autocast = self.arithmetic == "autocast"
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if autocast else nullcontext():
            return self._deepspeed(batch, layout)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of `loss`; its scale is the caller's business."""
        self._deepspeed.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Call it after each backward. After a step's last one the optimizer moves, unless a gradient is not finite."""
        if not self._sharded and self._deepspeed.is_gradient_accumulation_boundary():
            limit = self.config.optimizer.clip_grad_norm
            self._norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit))
            if not math.isfinite(self._norm):
                self._deepspeed.zero_grad()
        self._deepspeed.step()

    def enter_phase(self, config: RunConfig) -> None:
        """Go on with the batch size and the rotary base of `config`; weights and moments stay."""
        self.config = config
        self._deepspeed.set_train_batch_size(accumulation_steps(config, self.world_size) * self.world_size)
        # DeepSpeed counts micro-batches since its start, and takes every n-th as the last of a step.
        self._deepspeed.micro_steps = 0
        theta = config.model.rotary_theta
        self._encoder.rotary_theta = None if theta == self._encoder.config.rotary_theta else theta

    def set_tokens_seen(self, tokens_seen: int) -> None:
        """Tell the encoder how many tokens the run has seen: some configs drop positions after so many."""
        self._encoder.set_tokens_seen(tokens_seen)

    def train(self) -> None:
        """Prepare for forward passes with gradients."""
        self._deepspeed.train()

    def eval(self) -> None:
        """Prepare for forward passes without gradients."""
        self._deepspeed.eval()

    @property
    def grad_norm(self) -> float:
        """Global gradient norm of the last step before clipping; not finite if the step was skipped."""
        if not self._sharded:
            return self._norm
        return float(self._deepspeed.get_global_grad_norm()) if self._deepspeed.was_step_applied() else math.nan

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set it for the next step, in every group times the group's own factor."""
        for group in self.torch_optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]

    def set_optimizer_steps(self, steps: int) -> None:
        """Set the optimizer's own step count, which AdamW's bias correction needs."""
        for _, parameter in self.partition.flat_parameters():
            self.torch_optimizer.state[parameter]["step"].fill_(steps)

    def forget_moments(self) -> None:
        """Start the optimizer over: no steps, and moments of zero."""
        for state in self.torch_optimizer.state.values():
            for value in state.values():
                value.zero_()

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimizer took: skipped ones are not among them."""
        return int(self.torch_optimizer.state[self.partition.flat_parameters()[0][1]]["step"])
