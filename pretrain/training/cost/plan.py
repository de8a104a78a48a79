"""What a run needs before it is paid for: memory of every way to spread it over devices, what fits, and what to change.

Puts the arithmetic of `memory.py` and `activations.py` together for a config. Reads no device and starts nothing; how
a plan looks on a terminal is in `launch/show/memory_plan.py`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from pretrain.config.model import ModelConfig
from pretrain.config.parallel import ParallelConfig
from pretrain.config.run import RunConfig
from pretrain.config.training import OptimizerConfig
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.training.cost.activations import PLACES, Activations, Setting, activations
from pretrain.training.cost.memory import Buffers, ModelStates, buffers, checkpoint_bytes, compute_bytes, model_states
from pretrain.training.zero.muon import working_bytes
from pretrain.training.zero.optimizer import GroupSummary, parameter_groups, summarize_groups
from pretrain.training.zero.settings import ZERO_STAGE, resolve_precision

GIB = 2**30


USABLE = 0.92
"""Share of a device's memory that a plan may fill: its driver, NCCL and fragmentation take the rest (an assumption)."""


ENOUGH_POSITIONS = 4096
"""A micro-batch of fewer positions leaves a GPU idle between its kernels (an assumption)."""


AGAIN = (0, 2, 1)
"""Activation checkpointing that is planned for, the least work first: no block, every second, every one."""


@dataclass(frozen=True)
class Hardware:
    """What the ranks run on, one rank to a device."""

    name: str
    memory: int
    """Bytes that one rank may have."""
    world_size: int
    on_gpu: bool
    ranks_per_node: int
    """Ranks that share a node: what `hybrid` spreads the weights over once more."""
    peak: float | None = None
    """FLOP/s of one device in dense bf16; None where it is not known."""

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(USABLE * self.memory)


@dataclass(frozen=True)
class Choice:
    """One way to spread a run."""

    sharding: str
    checkpoint_every: int
    """Every how many blocks one is computed again; 0 for none."""
    micro_batch_size: int

    @property
    def overrides(self) -> list[str]:
        """As KEY=VALUE."""
        again = {0: "none", 1: "full"}.get(self.checkpoint_every, str(self.checkpoint_every))
        return [
            f"training.sharding={self.sharding}",
            f"training.activation_checkpointing={again}",
            f"training.micro_batch_size={self.micro_batch_size}",
        ]


@dataclass(frozen=True)
class Need:
    """Bytes of one rank."""

    states: ModelStates
    buffers: Buffers
    activations: Activations
    on_gpu: bool
    saved: int
    """Of the copy from which a save in the background is written, on the average rank."""

    @property
    def host(self) -> int:
        """Of the host's memory, beside what the device holds."""
        return self.states.host + self.saved

    @property
    def total(self) -> int:
        """At the peak: while gradients flow, or while the optimizer moves and activations are gone.

        Of the device; where that is the host, with all that is there.
        """
        own = self.states.total + (0 if self.on_gpu else self.host)
        return own + max(self.buffers.communication + self.activations.peak, self.buffers.update)


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


def optimizer_shape(model: ModelConfig, vocab_size: int, optimizer: OptimizerConfig) -> OptimizerShape:
    """From the real module on the meta device."""
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


class Plan:
    """Every way to spread a run over some devices, in the phase whose micro-batches need most."""

    def __init__(self, config: RunConfig, vocab_size: int, hardware: Hardware) -> None:
        self.run, self.vocab_size, self.hardware = config, vocab_size, hardware
        self.optimizer = optimizer_shape(config.model, vocab_size, config.optimizer)
        self.parameters = sum(map(sum, self.optimizer.sizes))
        phases = [config.in_phase(phase) for phase in range(len(config.phases) + 1)]
        self.phase = max(range(len(phases)), key=lambda p: self._at_once(phases[p]))
        self.config = phases[self.phase]
        """As `run`, with the settings of that phase."""

    def _at_once(self, phase: RunConfig) -> int:
        choice = replace(self.configured_in(phase), sharding="none")
        return activations(self._setting(phase, choice)).peak

    def configured_in(self, config: RunConfig) -> Choice:
        """What a config itself says."""
        training = config.training
        again = training.activation_checkpointing
        every = {"none": 0, "full": 1}[again] if isinstance(again, str) else again
        return Choice(training.sharding, every, min(training.micro_batch_size, self.rows_per_rank(config)))

    @property
    def configured(self) -> Choice:
        """What the config says."""
        return self.configured_in(self.config)

    @cached_property
    def precision(self) -> str:
        """`fp32` or `bf16`; `auto` is bf16 on a GPU, and what this machine's own is on a CPU."""
        if self.run.training.precision == "auto" and self.hardware.on_gpu:
            return "bf16"
        return resolve_precision(self.run)

    @property
    def compiled(self) -> bool:
        """Whether blocks are compiled."""
        choice = self.run.training.compile
        return self.hardware.on_gpu if choice == "auto" else choice == "on"

    def rows_per_rank(self, config: RunConfig) -> int:
        """Rows of one rank in a step, or of the ranks that share them."""
        return math.ceil(config.training.batch_size / config.parallel.data_ranks(self.hardware.world_size))

    @property
    def micro_batch_sizes(self) -> list[int]:
        """Powers of two up to the rows of a rank, and those rows."""
        rows = self.rows_per_rank(self.config)
        return sorted({2**k for k in range(rows.bit_length()) if 2**k <= rows} | {rows})

    def _setting(self, config: RunConfig, choice: Choice) -> Setting:
        data = config.data
        c = compute_bytes(ZERO_STAGE[choice.sharding], self.precision)
        autocast = self.precision == "bf16" and c == 4
        rate = max(data.mask_rate, data.final_mask_rate or 0)
        return Setting(
            model=config.model,
            vocab_size=self.vocab_size,
            rows=choice.micro_batch_size,
            length=data.sequence_length,
            masked=math.ceil(rate * choice.micro_batch_size * data.sequence_length / config.parallel.sequence),
            compute_bytes=2 if autocast else c,
            residual_bytes=c,
            checkpoint_every=choice.checkpoint_every,
            compiled=self.compiled,
            on_gpu=self.hardware.on_gpu,
            packed=data.packing != "padded",
            places=PLACES,
            sequence=config.parallel.sequence,
        )

    def need(self, choice: Choice) -> Need:
        """Bytes of the rank that needs most."""
        stage, world_size = ZERO_STAGE[choice.sharding], self.hardware.world_size
        accumulation = math.ceil(self.rows_per_rank(self.config) / choice.micro_batch_size)
        shape = self.optimizer
        spread = (stage, world_size, self.precision, accumulation)
        training = self.config.training
        offload = "none" if choice.sharding in ("none", "hybrid") else training.offload
        beside = buffers(
            shape.sizes,
            *spread,
            reduce_in_fp32=training.reduce_dtype == "fp32",
            overlap=training.overlap_communication == "on",
            offload=offload != "none",
        )
        if shape.largest:
            # Stages 1 and 2 cut at most one matrix between two ranks; stage 3 cuts all of them.
            shared = 0 if stage == 0 or world_size == 1 else shape.orthogonal if stage == 3 else shape.largest
            element = 2 if self.precision == "bf16" else 4
            beside = replace(beside, update=beside.update + working_bytes(shape.largest, shared, element))
        states = model_states(shape.sizes, shape.moments, *spread, offload=offload)
        copied = self.run.checkpoint.background and offload != "nvme"
        if choice.sharding == "hybrid":
            again = compute_bytes(stage, self.precision) * math.ceil(self.parameters / self.hardware.ranks_per_node)
            states = replace(states, weights=states.weights + again)
        return Need(
            states=states,
            buffers=beside,
            activations=activations(self._setting(self.config, choice)),
            on_gpu=self.hardware.on_gpu,
            saved=math.ceil(self.checkpoint_bytes / world_size) if copied else 0,
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Of each checkpoint."""
        return checkpoint_bytes(self.optimizer.sizes, self.optimizer.moments)

    def fits(self, choice: Choice, limit: float | None = None) -> bool:
        """Whether the peak is within `limit` bytes, by default what a plan may fill."""
        return self.need(choice).total <= (self.hardware.usable if limit is None else limit)

    def sent_for_attention(self, choice: Choice) -> int:
        """Bytes that a rank sends in a step to those that it shares rows with: positions for heads, and back."""
        config, model = self.config, self.config.model
        size, rows = config.parallel.sequence, self.rows_per_rank(config)
        positions = rows * config.data.sequence_length / size
        again = 1 / choice.checkpoint_every if choice.checkpoint_every else 0.0
        # q, k, v and what attention made of them, forwards, backwards, and where a block is computed again
        tensors = 4 * (2 + again) * model.num_layers
        c = self._setting(config, choice).compute_bytes
        return round(tensors * c * model.attention_size * positions * (size - 1) / size)

    @property
    def shardings(self) -> tuple[str, ...]:
        """Worth a thought, the least work first.

        Alone, a rank in fp32 has nothing to share and would only hold copies; in bf16 `none` computes by autocast, and
        some settings do not go with it.
        """
        alone = self.hardware.world_size == 1 and self.precision == "fp32"
        training = self.run.training
        allowed = training.offload == "none" and training.overlap_communication != "on"
        return ("none",) if alone and allowed else ("optimizer", "gradients", "full")

    def choices(self) -> Iterator[Choice]:
        """In the order in which they are preferred: the least work first, larger micro-batches before smaller.

        A single micro-batch that is too small to keep a device busy comes after all that are large enough.
        """
        largest_first = self.micro_batch_sizes[::-1]
        positions = self.config.data.sequence_length // self.config.parallel.sequence
        enough = [m for m in largest_first if m * positions >= ENOUGH_POSITIONS]
        enough = enough or largest_first[:1]
        for sizes in (enough, [m for m in largest_first if m not in enough]):
            for every in AGAIN:
                for sharding in self.shardings:
                    for micro_batch_size in sizes:
                        yield Choice(sharding, every, micro_batch_size)

    def recommended(self, limit: float | None = None) -> Choice | None:
        """The first choice that fits; None where none does."""
        return next((choice for choice in self.choices() if self.fits(choice, limit)), None)

    @property
    def smallest(self) -> Choice:
        """What needs least on these devices."""
        return Choice(self.shardings[-1], 1, 1)

    def remedies(self) -> list[str]:
        """What would make it fit where nothing does, each on its own."""
        found = []
        devices = (self.hardware.world_size * 2**k for k in range(1, 13))
        for world_size in devices:
            larger = Plan(self.run, self.vocab_size, replace(self.hardware, world_size=world_size))
            if larger.fits(self.smallest):
                found.append(f"use {world_size} devices")
                break
        found += self._shared_rows() + self._offload()
        length, shared = self.config.data.sequence_length, self.run.parallel.sequence
        halves = (length // 2**k for k in range(1, length.bit_length()))
        for shorter in (half for half in halves if half >= 8 and half % shared == 0):
            data = self.run.data.model_copy(update={"sequence_length": shorter})
            shortened = Plan(self.run.model_copy(update={"data": data, "phases": []}), self.vocab_size, self.hardware)
            if shortened.fits(self.smallest):
                found.append(f"shorten rows to data.sequence_length={shorter}")
                break
        least = math.ceil(self.need(self.smallest).total / USABLE / GIB)
        found.append(f"use devices of {least:,} GiB or more")
        return found

    def _shared_rows(self) -> list[str]:
        """As a remedy, the fewest ranks to a row with which it fits on the devices that there are."""
        run, world_size = self.run, self.hardware.world_size
        lengths = {run.in_phase(phase).data.sequence_length for phase in range(len(run.phases) + 1)}
        numbers = {world_size, run.model.num_heads, *lengths}
        step = run.parallel.sequence
        for size in range(2 * step, world_size + 1, step):
            if all(number % size == 0 for number in numbers):
                shared = run.model_copy(update={"parallel": ParallelConfig(sequence=size)})
                if Plan(shared, self.vocab_size, self.hardware).fits(self.smallest):
                    return [f"share rows by parallel.sequence={size}"]
        return []

    def _offload(self) -> list[str]:
        """As a remedy, the optimizer in the host's memory, if the devices are not that themselves."""
        run = self.run
        if not self.hardware.on_gpu or run.optimizer.kind == "muon" or run.training.offload != "none":
            return []
        # Whatever folder it would be, and a sharding that goes with it: choices have their own.
        shared = {"sharding": "full", "offload_folder": "/"}
        updates = [{**shared, "offload": place} for place in ("cpu", "nvme")]
        runs = [run.model_copy(update={"training": run.training.model_copy(update=update)}) for update in updates]
        moved, in_files = (Plan(moved_run, self.vocab_size, self.hardware) for moved_run in runs)
        if not moved.fits(moved.smallest):
            return []
        choice = moved.recommended() or moved.smallest
        all_of_it, beside_files = (p.need(choice).host * self.hardware.ranks_per_node / GIB for p in (moved, in_files))
        words = " ".join(["training.offload=cpu", *choice.overrides])
        return [
            f"keep the optimizer in host memory ({all_of_it:,.0f} GiB a node, or {beside_files:,.0f} and the rest in "
            f"files with offload=nvme): {words}"
        ]


def advice(config: RunConfig, vocab_size: int, hardware: Hardware) -> str:
    """What to change in a run that has run out of memory, in one sentence; it must need much less than it does now."""
    plan = Plan(config, vocab_size, hardware)
    now = plan.need(plan.configured).total
    least = plan.need(plan.smallest).total
    better = plan.recommended(min(hardware.usable, 0.8 * now))
    head = f"By plan it needs {now / GIB:.3g} GiB a rank, of {hardware.memory / GIB:.3g} GiB"
    if better is not None:
        return f"{head}; {' '.join(better.overrides)} needs {plan.need(better).total / GIB:.3g} GiB"
    remedies = ", or ".join(plan.remedies())
    return f"{head}, and no less than {least / GIB:.3g} GiB however it is spread: {remedies}"
