"""The run's typed schema, and how a YAML file, its includes and KEY=VALUE overrides become one `RunConfig`.

What a value *means* is said in the docstring under each field; `diptych config schema` prints the same text.
Nothing here opens a corpus, starts a process or imports torch.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from yaml import YAMLError

from pretrain.cluster_config import ClusterConfig as ClusterConfig
from pretrain.data_config import AbsolutePath as AbsolutePath
from pretrain.data_config import CorpusConfig as CorpusConfig
from pretrain.data_config import DataConfig as DataConfig
from pretrain.data_config import FilterConfig as FilterConfig
from pretrain.data_config import SourceConfig as SourceConfig
from pretrain.data_config import SplitsConfig as SplitsConfig
from pretrain.data_config import TokenizerConfig as TokenizerConfig
from pretrain.errors import UserError
from pretrain.model_config import LayerConfig as LayerConfig
from pretrain.model_config import ModelConfig as ModelConfig
from pretrain.parallel_config import ParallelConfig as ParallelConfig
from pretrain.section import Count, Section
from pretrain.training_config import CheckpointConfig as CheckpointConfig
from pretrain.training_config import OptimizerConfig as OptimizerConfig
from pretrain.training_config import ScheduleConfig as ScheduleConfig
from pretrain.training_config import SupervisionConfig as SupervisionConfig
from pretrain.training_config import TrainingConfig as TrainingConfig


class EvaluationConfig(Section):
    """The context-extension report. `diptych evaluate context --full` takes several times as much of everything."""

    lengths: list[Annotated[float, Field(gt=0)]] = Field(default=[0.5, 1, 2, 4, 8, 16])
    """Context lengths, as multiples of `data.sequence_length`; 1 is always among them. Those that the corpus has no
    documents for are left out."""
    windows: Count = 128
    """Target windows to score; each is scored at every length."""
    reading_windows: Count = 16
    """Of them, those on which ways to read long rows (position interpolation, YaRN, ...) are compared."""
    task_samples: Count = 1
    """Rows for each distance, depth and side of the synthetic tasks."""
    attention_windows: Count = 2
    """Windows whose attention is looked at."""
    pseudo_targets: Count = 32
    """Targets that are also predicted with nothing else masked."""
    context_threshold: Annotated[float, Field(gt=0)] = 0.5
    """A target needs context if its loss falls by more than so many nats from the shortest length to 1x."""
    split: Literal["valid", "test"] = "test"
    """Which documents the windows come from."""
    tokens_per_batch: Count = 16_384
    """Positions put through the model at once."""


class PhaseConfig(Section):
    """A part of the run with settings of its own; what it does not give stays as the run has it."""

    from_tokens: Annotated[int, Field(ge=1)]
    """The phase begins with the first step after this many tokens (padding not counted)."""
    sequence_length: Annotated[int, Field(ge=8)] | None = None
    """Positions per row."""
    batch_size: Count | None = None
    """Rows per optimizer step."""
    micro_batch_size: Count | None = None
    """Largest number of rows that one rank puts through the model at once."""
    mask_rate: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the tokens that are to be predicted, constant during the phase."""
    rotary_theta: Annotated[float, Field(gt=1)] | None = None
    """Base of the rotary frequencies."""
    source_weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """As `data.source_weights`, for shards that are begun in the phase."""


GroupName = Annotated[str, BeforeValidator(lambda name: str(name) if type(name) in (int, float) else name)]
"""Of settings on an axis of a sweep; a bare number in YAML is a name too."""


class RunConfig(Section):
    """A complete run: corpus, model, training, evaluation."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Names the run folder; by default the name of the config file."""
    runs: AbsolutePath = Path("runs")
    """Folder of run folders."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the initial weights, the order of rows and every mask."""
    corpus: CorpusConfig
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
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

        def section(config: Section, keys: tuple[str, ...]) -> dict[str, Any]:
            return config.model_dump() | {key: given[key] for key in keys if key in given}

        data = section(self.data, ("sequence_length", "mask_rate", "source_weights"))
        if "mask_rate" in given:
            data["final_mask_rate"] = None
        training = section(self.training, ("batch_size", "micro_batch_size"))
        return self.model_copy(
            update={
                "data": DataConfig.model_validate(data),
                "training": TrainingConfig.model_validate(training),
                "model": ModelConfig.model_validate(section(self.model, ("rotary_theta",))),
            }
        )

    @property
    def run_folder(self) -> Path:
        """Where everything that this run writes lies."""
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
            self._check_phase(self.in_phase(phase), phase)
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

    def _check_phase(self, config: "RunConfig", phase: int) -> None:
        longest = config.data.sequence_length
        if config.model.positions == "learned" and longest > config.model.max_positions:
            raise ValueError(f"phase {phase}: sequence_length = {longest} is beyond model.max_positions")


def _batch_sizes(config: RunConfig) -> list[int]:
    return [config.training.batch_size, *(phase.batch_size for phase in config.phases if phase.batch_size)]


def works_with(config: RunConfig, world_size: int) -> bool:
    """Whether the streams and every batch can be divided among so many ranks, those that share rows being one."""
    _, readers = config.parallel.reader(0, world_size)
    numbers = (config.data.streams, *_batch_sizes(config))
    return world_size == readers * config.parallel.sequence and all(number % readers == 0 for number in numbers)


def check_topology(config: RunConfig, world_size: int, ranks_per_node: int | None = None) -> None:
    """Refuse a number of ranks that the batch or the streams cannot be divided by, or `hybrid` without several nodes.

    `ranks_per_node` is by default all of them: one machine.

    Raises:
        UserError: naming the two numbers and the choices that work.
    """
    if not works_with(config, world_size):
        size = config.parallel.sequence
        works = [n for n in range(size, size * config.data.streams + 1, size) if works_with(config, n)]
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
        if world_size % size:
            problem = f"{ranks} cannot be put into groups of parallel.sequence = {size}"
        else:
            groups = f" in groups of parallel.sequence = {size}" if size > 1 else ""
            problem = (
                f"{ranks}{groups} cannot share data.streams = {config.data.streams} and training.batch_size = "
                f"{', '.join(map(str, _batch_sizes(config)))} evenly"
            )
        raise UserError(f"{problem}; use one of {', '.join(map(str, works))} ranks, or change these")
    per_node = ranks_per_node or world_size
    if config.training.sharding == "hybrid" and (world_size % per_node or not 1 < per_node < world_size):
        raise UserError(
            "training.sharding = hybrid keeps the weights once more on the ranks of each node: it is for several nodes "
            f"with as many ranks each, at least 2, not for {world_size} ranks, {per_node} to a node; use "
            "training.sharding=full"
        )


# ----------------------------------------------------------------------------------------- files -> RunConfig


def config_folder() -> Path:
    """The folder of the configs that come with Diptych: inside the wheel, or `configs/` of a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def find_config(name: str, beside: Path | None = None) -> Path:
    """A config file by path (from the working directory or `beside`) or by its name among the packaged ones.

    Raises:
        UserError: if there is no such file; lists what there is.
    """
    folders = ([beside] if beside else []) + [Path.cwd(), config_folder(), config_folder().parent]
    candidates = [folder / file for folder in folders for file in (name, f"{name}.yaml")]
    for path in candidates:
        if path.is_file():
            return path.absolute()
    packaged = sorted(str(p.relative_to(config_folder()).with_suffix("")) for p in config_folder().rglob("*.yaml"))
    nearest = [path for path in packaged if path.split("/")[-1] == name] or difflib.get_close_matches(name, packaged, 1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"no config {name!r}: neither a file nor one of {', '.join(packaged)}{hint}")


def _merge_file(path: Path, including: tuple[Path, ...] = ()) -> DictConfig:
    if path in including:
        raise UserError(f"{path} includes itself, by way of {' -> '.join(p.name for p in (*including, path))}")
    try:
        content = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{path}: expected `key: value` lines at the top, found {type(content).__name__}")
    includes = content.pop("include", [])
    parts = [_merge_file(find_config(name, beside=path.parent), (*including, path)) for name in includes]
    merged = OmegaConf.merge(*parts, content)
    assert isinstance(merged, DictConfig)
    return merged


def load_config(
    name: str, overrides: Sequence[str] = (), *, beneath: Mapping[str, Any] = MappingProxyType({})
) -> RunConfig:
    """Merge includes, then the file, then `KEY=VALUE` overrides, and validate.

    `beneath` is what holds where all of these say nothing, for what needs a part of a run only.

    Raises:
        UserError: naming each wrong path, its value, what is allowed and the nearest valid key.
    """
    path = find_config(name)
    content = OmegaConf.merge(dict(beneath), _merge_file(path))
    assert isinstance(content, DictConfig)
    content.setdefault("name", path.stem)
    try:
        for override in overrides:
            key, separator, _ = override.partition("=")
            if not separator:
                raise UserError(f"{override!r} is not KEY=VALUE, for instance training.tokens=1000000")
            OmegaConf.update(content, key, OmegaConf.select(OmegaConf.from_dotlist([override]), key), force_add=True)
        values = OmegaConf.to_container(content, resolve=True)
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: {error}") from error
    return validate(values, f"{path} with {' '.join(overrides)}" if 0 < len(overrides) < 4 else str(path))


def settings_in(path: Path) -> dict[str, Any]:
    """Dotted key -> value of what a config file and its includes set, not validated.

    Raises:
        UserError: if it is not readable.
    """
    return _flatten(OmegaConf.to_container(_merge_file(path)))


def validate(values: Any, origin: str) -> RunConfig:
    """Check plain values against the schema; `origin` names them in the error."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise UserError(f"{origin} is not a valid run:\n{problems}") from None


def _section_at(path: Sequence[str | int]) -> type[BaseModel] | None:
    """The schema class that the keys of `path` live in."""
    section: Any = RunConfig
    for part in path:
        if isinstance(part, int):
            continue
        field = _keys(section).get(part)
        if field is None:
            return None
        section = next((a for a in (field.annotation, *get_args(field.annotation)) if hasattr(a, "model_fields")), None)
        if section is None:
            return None
    return section


def _explain(problem: Any) -> str:
    """One pydantic error as an answer: path, value, what is allowed, the nearest valid key."""
    path = ".".join(map(str, problem["loc"])) or "config"
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        section = _section_at(problem["loc"][:-1])
        keys = list(_keys(section)) if section else []
        inside = problem["loc"][:-1]
        nearest = difflib.get_close_matches(str(problem["loc"][-1]), keys, n=1, cutoff=0.5)
        elsewhere = [key for key, _ in _leaves(RunConfig) if key.split(".")[-1] == problem["loc"][-1]]
        if nearest:
            hint = f"did you mean {'.'.join(map(str, (*inside, nearest[0])))}? "
        else:
            hint = f"did you mean {elsewhere[0]}? " if elsewhere else ""
        return f"{path}: unknown key (value {value!r}); {hint}Allowed here: {', '.join(keys)}"
    if problem["type"] == "missing":
        part = "; is this a part of a config? Then include it in one that names a corpus" if path == "corpus" else ""
        return f"{path}: required, but not given{part}"
    if path == "name" and problem["type"].startswith("string_"):
        return f"name: {value!r} cannot name a folder; use up to 100 letters, digits, '.', '_' and '-'"
    if problem["type"] == "literal_error":
        allowed = problem["ctx"]["expected"]
        nearest = difflib.get_close_matches(str(value), allowed.replace("'", "").replace(" or ", ", ").split(", "), n=1)
        return f"{path}: {value!r} is not allowed; allowed: {allowed}" + (f"; nearest: {nearest[0]}" if nearest else "")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" + ("" if isinstance(value, dict | BaseModel) else f" (given: {value!r})")


def _keys(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section, as they are called in a file."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in _keys(section).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, which `load_config` reads back to the same config."""
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(config.model_dump_json())))


def changes(saved: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (saved value, value now) for each leaf that differs."""
    before, after = _flatten(saved.model_dump(mode="json")), _flatten(now.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, child in value.items() for key, leaf in _flatten(child, f"{prefix}{name}.").items()}


FALSIFYING = (
    "seed",
    "model.",
    "data.sequence_length",
    "data.packing",
    "data.cut",
    "data.streams",
    "data.mask",
    "data.random_token_share",
    "optimizer.kind",
)
"""Keys (or beginnings of keys) that a resumed run may not change silently: it would be another run."""


def falsifying(differences: dict[str, tuple[Any, Any]]) -> list[str]:
    """Those of the changed keys that would make the resumed run another run."""
    return [key for key in differences if key.startswith(FALSIFYING) and key != "model.kernel"]
