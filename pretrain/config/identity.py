"""Which changes of a config make another run."""

from typing import Any

from pretrain.config.cluster import ClusterConfig as ClusterConfig
from pretrain.config.data import CorpusConfig as CorpusConfig
from pretrain.config.data import DataConfig as DataConfig
from pretrain.config.data import FilterConfig as FilterConfig
from pretrain.config.data import SourceConfig as SourceConfig
from pretrain.config.data import SplitsConfig as SplitsConfig
from pretrain.config.data import TokenizerConfig as TokenizerConfig
from pretrain.config.model import LayerConfig as LayerConfig
from pretrain.config.model import ModelConfig as ModelConfig
from pretrain.config.parallel import ParallelConfig as ParallelConfig
from pretrain.config.run import RunConfig
from pretrain.config.section import AbsolutePath as AbsolutePath
from pretrain.config.training import CheckpointConfig as CheckpointConfig
from pretrain.config.training import OptimizerConfig as OptimizerConfig
from pretrain.config.training import ScheduleConfig as ScheduleConfig
from pretrain.config.training import SupervisionConfig as SupervisionConfig
from pretrain.config.training import TrainingConfig as TrainingConfig


def changes(saved: RunConfig, now: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (saved value, value now) for each leaf that differs."""
    before, after = flatten(saved.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    return {
        key: (before.get(key), after.get(key))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of each leaf of nested dicts."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {key: leaf for name, child in value.items() for key, leaf in flatten(child, f"{prefix}{name}.").items()}


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
