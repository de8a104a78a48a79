"""Every way to spread a run over some devices, in the order in which they are preferred, and the first that fits.

Reads no device and starts nothing. What a way needs is in `need.py`, what to change where none fits in `advice.py`;
how a plan looks on a terminal is in `launch/show/memory_plan.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.config.run import RunConfig
from pretrain.training.cost.activations import activations
from pretrain.training.cost.hardware import Hardware
from pretrain.training.cost.need import Need, forward_pass, memory_need, optimizer_shape, planned_precision
from pretrain.training.zero.settings import checkpoint_every, rows_per_rank

ENOUGH_POSITIONS = 4096
"""Positions of a micro-batch that keep a GPU busy between its kernels (an assumption)."""
RECOMPUTE_EVERY = (0, 2, 1)
"""Activation checkpointing that is planned for, the least work first: no block, every second, every one."""


@dataclass(frozen=True)
class Choice:
    """One way to spread a run."""

    sharding: str
    checkpoint_every: int
    """k where every k-th block is computed again; 0 for none."""
    micro_batch_size: int

    @property
    def settings(self) -> dict[str, str | int]:
        """Keys and values in the section `training`."""
        again = {0: "none", 1: "full"}.get(self.checkpoint_every, self.checkpoint_every)
        return {
            "sharding": self.sharding,
            "activation_checkpointing": again,
            "micro_batch_size": self.micro_batch_size,
        }

    @property
    def overrides(self) -> list[str]:
        """Settings as KEY=VALUE of a command."""
        return [f"training.{key}={value}" for key, value in self.settings.items()]

    def applied_to(self, config: RunConfig) -> RunConfig:
        """Return a config that is spread in this way."""
        return config.model_copy(update={"training": config.training.model_copy(update=self.settings)})


class MemoryPlan:
    """The ways to spread a run over some devices, in the phase whose micro-batches need most."""

    def __init__(self, run: RunConfig, vocab_size: int, hardware: Hardware) -> None:
        self.run, self.vocab_size, self.hardware = run, vocab_size, hardware
        self.optimizer = optimizer_shape(run.model, vocab_size, run.optimizer)
        self.precision = planned_precision(run, hardware)
        phases = [run.in_phase(phase) for phase in range(len(run.phases) + 1)]
        at_once = [activations(forward_pass(phase, vocab_size, hardware)).peak for phase in phases]
        self.phase = at_once.index(max(at_once))
        self.config = phases[self.phase]
        """The run with the settings of that phase."""

    def varied(self, run: RunConfig | None = None, hardware: Hardware | None = None) -> "MemoryPlan":
        """Return the plan of another run, or on other hardware."""
        return MemoryPlan(run or self.run, self.vocab_size, hardware or self.hardware)

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return self.optimizer.parameters

    @property
    def rows(self) -> int:
        """Rows of one rank in a step, or of the ranks that share them."""
        return rows_per_rank(self.config, self.hardware.world_size)

    @property
    def configured(self) -> Choice:
        """What the config says."""
        training = self.config.training
        return Choice(training.sharding, checkpoint_every(self.config), min(training.micro_batch_size, self.rows))

    @property
    def micro_batch_sizes(self) -> list[int]:
        """Powers of two up to the rows of a rank, and those rows."""
        return sorted({2**k for k in range(self.rows.bit_length())} | {self.rows})

    @property
    def shardings(self) -> tuple[str, ...]:
        """Shardings that are worth a thought, the least work first.

        Alone, a rank in fp32 has nothing to share and would only hold copies; in bf16 `none` computes by autocast, and
        some settings do not go with it.
        """
        alone = self.hardware.world_size == 1 and self.precision == "fp32"
        training = self.run.training
        allowed = training.offload == "none" and training.overlap_communication != "on"
        return ("none",) if alone and allowed else ("optimizer", "gradients", "full")

    @property
    def smallest(self) -> Choice:
        """What needs least on these devices."""
        return Choice(self.shardings[-1], 1, 1)

    def choices(self) -> Iterator[Choice]:
        """Yield the ways in the order in which they are preferred: the least work, then larger micro-batches, first.

        A single micro-batch that is too small to keep a device busy comes after all that are large enough.
        """
        largest_first = self.micro_batch_sizes[::-1]
        positions = self.config.data.sequence_length // self.config.parallel.sequence
        enough = [m for m in largest_first if m * positions >= ENOUGH_POSITIONS]
        enough = enough or largest_first[:1]
        for sizes in (enough, [m for m in largest_first if m not in enough]):
            for every in RECOMPUTE_EVERY:
                for sharding in self.shardings:
                    for micro_batch_size in sizes:
                        yield Choice(sharding, every, micro_batch_size)

    def need(self, choice: Choice) -> Need:
        """Return the bytes of the rank that needs most."""
        return memory_need(choice.applied_to(self.config), self.vocab_size, self.optimizer, self.hardware)

    def fits(self, choice: Choice, limit: float | None = None) -> bool:
        """Return whether the peak is within `limit` bytes, by default what a plan may fill."""
        return self.need(choice).total <= (self.hardware.usable if limit is None else limit)

    def recommended(self, limit: float | None = None) -> Choice | None:
        """Return the first choice that fits; None where none does."""
        return next((choice for choice in self.choices() if self.fits(choice, limit)), None)
