"""The sections `training`, `checkpoint` and `supervision`: how a run steps, saves and is watched."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.config.section import Count, Fixed, OnOff, Section, Share


class MuonConfig(Section):
    """How Muon moves matrices (Jordan et al. 2024; Liu et al., arXiv 2502.16982)."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Share of the past in the running mean of the gradients."""
    nesterov: bool = True
    """Look ahead: orthogonalise the mean as it would be if the gradient came once more."""
    steps: Count = 5
    """Newton-Schulz iterations."""
    update_rms: Annotated[float, Field(gt=0)] = 0.2
    """Root mean square of an update at learning rate 1. With 0.2 it is about AdamW's, so that one learning rate and
    weight decay serve both; twice as much gives matrices twice the learning rate of the rest."""


class OptimizerConfig(Section):
    """AdamW for everything, or Muon for the matrices between hidden layers and AdamW for the rest."""

    kind: Fixed[Literal["adamw", "muon"]] = "adamw"
    """`muon` keeps one moment of a matrix instead of two, and wants a higher learning rate (docs/training.md)."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Applied to matrices only: not to norms, not to embeddings."""
    clip_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    muon: MuonConfig = MuonConfig()
    """Settings of `kind: muon` only."""

    @model_validator(mode="after")
    def _muon_is_used(self) -> "OptimizerConfig":
        if self.kind != "muon" and self.muon != MuonConfig():
            raise ValueError(f"muon has settings, but kind is {self.kind}; add optimizer.kind=muon, or leave them out")
        return self


class ScheduleConfig(Section):
    """Warm-up, stable, decay: the learning rate as a pure function of tokens seen."""

    warmup: Share = 0.03
    """Share of `training.tokens` during which the rate rises linearly from zero."""
    decay: Share = 0.3
    """Share of `training.tokens`, at the end, during which it falls linearly."""
    final: Share = 0.02
    """Fraction of the peak that it falls to."""

    @model_validator(mode="after")
    def _phases_fit(self) -> "ScheduleConfig":
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup + decay = {self.warmup + self.decay:g} is more than the whole run")
        return self


class TrainingConfig(Section):
    """How long, in what portions, in which precision, and how it is spread over ranks."""

    tokens: Count = 3_500_000
    """Stop after this many tokens (padding not counted)."""
    batch_size: Count = 64
    """Rows per optimizer step, over all ranks and micro-batches."""
    micro_batch_size: Count = 32
    """Largest number of rows that one rank puts through the model at once."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 where the processor multiplies bf16 matrices natively, fp32 elsewhere."""
    sharding: Literal["none", "optimizer", "gradients", "full", "hybrid"] = "optimizer"
    """What is spread over the ranks: ZeRO stage 0, 1, 2 or 3. `hybrid` is `full`, and the ranks of each node together
    keep the weights once more, so that backward passes gather them inside the node (Wang et al., arXiv 2306.10209)."""
    reduce_dtype: Literal["auto", "fp32"] = "auto"
    """Type in which gradients are summed over ranks: `auto` is what they are computed in; `fp32` rounds no sum, and
    sends twice as much in bf16 runs."""
    overlap_communication: Annotated[Literal["auto", "on", "off"], OnOff] = "auto"
    """Sum gradients over ranks while the backward pass still runs, in two buckets by turns: `auto` is on under `full`
    and `hybrid`. Without sharding they are always summed after it."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Place of the fp32 master weights and the moments: `cpu` is the host's memory, where AdamW then moves them. For
    GPUs whose memory they do not fit into; each step waits for the transfer. `nvme` is as `cpu`, with the moments, and
    under `full` the master weights, in files of `offload_folder`: for hosts with too little memory as well. Checkpoints
    are then saved from there, and never in the background."""
    offload_folder: str | None = None
    """Folder for `offload: nvme`, on a fast disk that each node has for itself. It may name variables of the node's
    environment: `$TMPDIR`."""
    activation_checkpointing: Literal["none", "full"] | Count = "none"
    """Compute blocks again in the backward pass instead of keeping what is inside them: `none`, `full` (all blocks) or
    k (every k-th block)."""
    compile: Annotated[Literal["auto", "on", "off"], OnOff] = "auto"
    """torch.compile of the blocks, once for all lengths; `auto` is on for CUDA."""
    max_skipped_steps: Count = 5
    """Stop with an error after this many steps in a row were skipped."""
    spikes: Annotated[Literal["off", "skip", "rollback"], OnOff] = "off"
    """What follows a loss far above those before it. `off`: it is reported, and the step is taken: clipping and the
    optimizer bound what it can do. `skip`: the step is not taken. `rollback`: as `skip`, and instead of stopping after
    `max_skipped_steps` the run goes back to its last checkpoint and on with the rows behind the offending ones. The
    last two look at each loss before the optimizer moves, which costs one more wait for the device per step."""
    spike_threshold: Annotated[float, Field(gt=0)] = 10.0
    """How far a spike is above the median of the last 128 losses, in robust standard deviations of these."""
    log_every: Count = 10
    """Steps between two progress lines; metrics.jsonl gets every step regardless."""
    validate_every: Count = 100
    """Steps between two validations; there is always one at the end."""
    validation_rows: Count = 512
    """Rows of the validation split in each of them, with fixed masks (fewer if the split has fewer)."""

    @model_validator(mode="after")
    def _sharding_allows_the_rest(self) -> "TrainingConfig":
        if self.overlap_communication == "on" and self.sharding == "none":
            raise ValueError("overlap_communication is on, but nothing is summed early under sharding none")
        if self.offload != "none" and self.sharding in ("none", "hybrid"):
            raise ValueError(
                f"offload is {self.offload}, but sharding is {self.sharding}; offload works with optimizer, gradients "
                "and full"
            )
        if self.offload == "nvme" and self.offload_folder is None:
            raise ValueError("offload is nvme, but offload_folder is not set: name a folder on a disk of each node")
        return self


class CheckpointConfig(Section):
    """Times at which the run is saved, and what is kept."""

    every: Count = 100
    """Steps between two checkpoints; there is always one at the end and on a signal."""
    keep_last: Count = 2
    """Keep this many of the newest."""
    keep_every: Annotated[int, Field(ge=0)] = 0
    """Keep also every checkpoint whose step is a multiple of this; 0 keeps none."""
    background: bool = Field(default=True, alias="async")
    """Hold the training up only to copy weights and moments to host memory (12 bytes a parameter, 8 of those that Muon
    moves, over all ranks); write them meanwhile. The last save of a run waits until it is on the disk."""
    strict: bool = False
    """Refuse to resume from an older checkpoint where a newer one is damaged."""


class SupervisionConfig(Section):
    """Limits after which a run that makes no progress is ended, so that it can be resumed (exit code 75)."""

    silence_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds in which a rank completes no step and no batch of a validation."""
    long_silence_s: Annotated[float, Field(gt=0)] = 1800.0
    """The same while a rank starts, compiles, or loads or saves a checkpoint."""

    @property
    def collective_s(self) -> float:
        """Seconds after which a collective fails by itself: a while after the watchdog would have ended the run."""
        return max(self.silence_s, self.long_silence_s) + 120.0
