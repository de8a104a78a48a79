"""What a user asks of an evaluation. Needs no torch: the command line makes it."""

from dataclasses import dataclass
from pathlib import Path

from pretrain.run.folder import RunFolder


@dataclass(frozen=True)
class Request:
    """What is to be measured."""

    run_folder: Path
    step: int | None = None
    """Checkpoint to read; None: the newest valid one."""
    lengths: tuple[float, ...] | None = None
    """Multiples of the training length; None: as configured, without those that cannot be measured."""
    corpus: Path | None = None
    """Another corpus of the same tokenizer; None: the run's own."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE of the config's section `evaluation`, written evaluation.KEY=VALUE."""
    full: bool = False
    """Several times as much of everything."""
    budget_s: float | None = None
    """Time limit."""

    def report_folder(self, split: str) -> Path:
        """Return where the report goes: `context` for the newest checkpoint on the run's own test split."""
        words = ["context"]
        words += [split] if split != "test" else []
        words += [self.corpus.name] if self.corpus is not None else []
        words += [f"step-{self.step}"] if self.step is not None else []
        return RunFolder(self.run_folder).evaluation / "-".join(words)
