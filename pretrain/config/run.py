"""`RunConfig`: all sections of a run together, and its phases."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from pretrain.config.cluster import ClusterConfig
from pretrain.config.data import CorpusConfig, DataConfig
from pretrain.config.evaluation import EvaluationConfig
from pretrain.config.model import ModelConfig
from pretrain.config.parallel import ParallelConfig
from pretrain.config.section import AbsolutePath, Count, Fixed, Section
from pretrain.config.training import (
    CheckpointConfig,
    OptimizerConfig,
    ScheduleConfig,
    SupervisionConfig,
    TrainingConfig,
)


class PhaseConfig(Section):
    """A part of the run with settings of its own; what it does not give stays as the run has it."""

    from_tokens: Fixed[Annotated[int, Field(ge=1)]]
    """The phase begins with the first step after this many tokens (padding not counted)."""
    sequence_length: Fixed[Annotated[int, Field(ge=8)] | None] = None
    """Positions per row."""
    batch_size: Count | None = None
    """Rows per optimizer step."""
    micro_batch_size: Count | None = None
    """Largest number of rows that one rank puts through the model at once."""
    mask_rate: Fixed[Annotated[float, Field(gt=0, lt=1)] | None] = None
    """Share of the tokens that are to be predicted, constant during the phase."""
    rotary_theta: Fixed[Annotated[float, Field(gt=1)] | None] = None
    """Base of the rotary frequencies."""
    source_weights: Fixed[dict[str, Annotated[float, Field(ge=0)]] | None] = None
    """Weights like `data.source_weights`, for shards that are begun in the phase."""


GroupName = Annotated[str, BeforeValidator(lambda name: str(name) if type(name) in (int, float) else name)]
"""Name of a group of settings on an axis of a sweep; a bare number in YAML is a name too."""


class RunConfig(Section):
    """A complete run: corpus, model, training, evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Name of the run folder; by default that of the config file."""
    runs: AbsolutePath = Path("runs")
    """Folder of run folders."""
    seed: Fixed[Annotated[int, Field(ge=0, lt=2**32)]] = 0
    """Decides the initial weights, the order of rows and every mask."""
    corpus: CorpusConfig
    data: DataConfig = DataConfig()
    model: Fixed[ModelConfig] = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    supervision: SupervisionConfig = SupervisionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    cluster: ClusterConfig = ClusterConfig()
    sweep: dict[str, list[Any] | dict[GroupName, dict[str, Any]]] = Field(default={})
    """The axes of `diptych sweep`, ignored elsewhere: a key and its values, or a name and named groups of settings."""
    phases: list[PhaseConfig] = Field(default=[])
    """A curriculum, for instance long rows at the end: each phase changes some settings from a number of tokens on."""

    def phase_at(self, tokens_seen: int) -> int:
        """Number of the phase of the step after `tokens_seen`: 0 before the first of `phases`."""
        return sum(phase.from_tokens <= tokens_seen for phase in self.phases)

    def in_phase(self, phase: int) -> "RunConfig":
        """The run's settings in a phase; a setting stays until a later phase changes it."""
        given: dict[str, Any] = {}
        for entry in self.phases[:phase]:
            given |= entry.model_dump(exclude_none=True, exclude={"from_tokens"})
        if "mask_rate" in given:
            given["final_mask_rate"] = None
        sections: dict[str, Section] = {"data": self.data, "training": self.training, "model": self.model}
        return self.model_copy(
            update={
                name: section.changed({key: given[key] for key in type(section).model_fields if key in given})
                for name, section in sections.items()
            }
        )

    @property
    def run_folder(self) -> Path:
        """Folder of everything that this run writes."""
        return self.runs / self.name

    @model_validator(mode="after")
    def _parts_fit(self) -> "RunConfig":
        if self.model.positions == "learned" and self.data.sequence_length > self.model.max_positions:
            raise ValueError(
                f"data.sequence_length = {self.data.sequence_length} is beyond model.max_positions = "
                f"{self.model.max_positions}; raise the latter or use rotary positions"
            )
        begins = [phase.from_tokens for phase in self.phases]
        if begins != sorted(set(begins)):
            raise ValueError(f"phases must begin one after another, but their from_tokens are {begins}")
        for phase in range(1, len(self.phases) + 1):
            changed = self.in_phase(phase)
            longest = changed.data.sequence_length
            if changed.model.positions == "learned" and longest > changed.model.max_positions:
                raise ValueError(f"phase {phase}: sequence_length = {longest} is beyond model.max_positions")
        lengths = (phase.sequence_length for phase in self.phases if phase.sequence_length)
        self.parallel.check(self.model.num_heads, (self.data.sequence_length, *lengths))
        if self.training.offload != "none" and self.optimizer.kind == "muon":
            raise ValueError(
                f"training.offload is {self.training.offload}, but optimizer.kind is muon, whose matrix products are "
                "too much for the host; use adamw, or training.offload=none with more sharding"
            )
        if self.corpus.sources and self.corpus.min_train_shards < self.data.streams:
            raise ValueError(
                f"data.streams = {self.data.streams} need a shard each, but corpus.min_train_shards = "
                f"{self.corpus.min_train_shards}; lower the one or raise the other"
            )
        return self
