"""The section `evaluation`: what the context report measures."""

from typing import Annotated, Literal

from pydantic import Field

from pretrain.config.section import Count, Section


class EvaluationConfig(Section):
    """The context-extension report. `diptych evaluate context --full` takes several times as much of everything."""

    lengths: list[Annotated[float, Field(gt=0)]] = Field(default=[0.5, 1, 2, 4, 8, 16])
    """Context lengths, as multiples of `data.sequence_length`; 1 is always among them. Those that the corpus has no
    documents for are left out."""
    windows: Count = 128
    """Target windows to score; each is scored at every length."""
    reading_windows: Count = 16
    """Windows, of those, on which ways to read long rows (position interpolation, YaRN, ...) are compared."""
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
