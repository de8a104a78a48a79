"""The plan of an evaluation: what is measured, on which windows, cut into parts that any rank can compute.

A plan is made once, saved, and decides every number: a part is a pure function of the plan. So an evaluation that was
interrupted goes on with the same plan, and ranks need not talk to each other.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pretrain.config.section import Section
from pretrain.evaluation.context.interventions import FACTORED
from pretrain.evaluation.context.tasks import num_rows
from pretrain.evaluation.context.windows import window_length
from pretrain.evaluation.report.titles import Intervention
from pretrain.run.folder import RunFolder

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

PartKind = Literal["scores", "task", "attention", "pseudo"]

Task = Literal["passkey", "multikey", "copy"]

TASKS: tuple[Task, ...] = ("passkey", "multikey", "copy")

TOKENS_PER_PART = 65_536
"""A part is no longer than this, so that ranks share the work evenly and little is lost when one is interrupted."""

ABLATED_TASKS_UP_TO = 2
"""Multiples at which tasks are repeated with a triangle off."""

PSEUDO_UP_TO = 4
"""Multiples beyond this have no pseudo-perplexity: it costs a whole row for each target."""


@dataclass(frozen=True)
class Part:
    """A piece of work."""

    kind: PartKind
    multiple: float
    intervention: Intervention = "plain"
    factor: float = 1.0
    """Factor of the intervention."""
    task: Task | None = None
    first: int = 0
    """First window."""
    last: int = 0
    """Window after the last."""
    positions: int = 0
    """Positions that are put through the model."""
    length: int = 0
    """Positions of a row."""

    @property
    def cost(self) -> float:
        """Weight for sharing out work: a layer's matrices cost as much as attention over some thousand positions."""
        return self.positions * (1 + self.length / 4096)

    @property
    def name(self) -> str:
        """Name of its file."""
        what = f"{self.kind}-{self.task}" if self.task else self.kind
        return f"{what}-{self.intervention}-{self.multiple:g}x-f{self.factor:g}-{self.first}"


class EvaluationPlan(Section):
    """What one evaluation measures."""

    format: Literal[1] = 1
    run_folder: Path
    step: int
    checkpoint_sha256: str
    corpus: Path
    fingerprint: str
    split: Literal["valid", "test"]
    seed: int
    training_length: int
    multiples: list[float]
    """Ascending; 1 is among them."""
    skipped: dict[str, str]
    """What was left out -> why."""
    windows: int
    reading_windows: int
    """The first of the windows, on which interventions are compared."""
    interventions: list[Intervention]
    ablations: list[Intervention]
    """Triangles to switch off."""
    tasks: list[Task]
    task_samples: int
    """Rows for each place of a task."""
    attention_windows: int
    pseudo_targets: int
    tokens_per_batch: int
    context_threshold: float
    budget: str | None = None
    """What a time limit made of the settings."""

    @property
    def key(self) -> str:
        """Digest of all that decides the numbers: parts of another plan are not mixed in."""
        return hashlib.sha256(self.model_dump_json(exclude={"budget"}).encode()).hexdigest()[:12]

    @property
    def checkpoint(self) -> Path:
        """The checkpoint whose encoder is measured."""
        return RunFolder(self.run_folder).checkpoint(self.step)

    @property
    def longest(self) -> int:
        """Positions of the longest window."""
        return self.length(self.multiples[-1])

    def length(self, multiple: float) -> int:
        """Positions of a window."""
        return window_length(multiple, self.training_length)

    @property
    def long_multiples(self) -> list[float]:
        """Multiples beyond the training length."""
        return [m for m in self.multiples if m > 1]

    @property
    def _whole(self) -> list[float]:
        return [m for m in self.multiples if m >= 1]

    def parts(self) -> list[Part]:
        """All of it, in an order in which the headline comes first."""
        attention = [self._windows("attention", m, self.attention_windows) for m in self._whole]
        pseudo = [self._windows("pseudo", m, self.pseudo_targets) for m in self._whole if m <= PSEUDO_UP_TO]
        return [
            *self._scores(self.windows, "plain", self.multiples),
            *self._intervention_parts(),
            *self._ablation_parts(),
            *self._task_parts(),
            *(part for part in (*attention, *pseudo) if part.last),
        ]

    def _windows(self, kind: PartKind, multiple: float, last: int, first: int = 0) -> Part:
        """Return a part of the windows from `first` up to `last`."""
        length = self.length(multiple)
        positions = (last - first) * max(length, self.training_length)
        return Part(kind, multiple, first=first, last=last, positions=positions, length=length)

    def _scores(
        self, windows: int, intervention: Intervention, multiples: Sequence[float], factor: float | None = None
    ) -> list[Part]:
        parts = []
        for multiple in multiples:
            size = max(1, TOKENS_PER_PART // max(self.length(multiple), self.training_length))
            used = (factor or max(multiple, 1.0)) if intervention in FACTORED else 1.0
            for first in range(0, windows, size):
                part = self._windows("scores", multiple, min(first + size, windows), first)
                parts.append(replace(part, intervention=intervention, factor=used))
        return parts

    def _intervention_parts(self) -> list[Part]:
        """Each intervention at every longer length, and at the training length with the factors that it was set for."""
        parts = []
        for name in self.interventions if self.long_multiples else []:
            parts += self._scores(self.reading_windows, name, self.long_multiples)
            for factor in self.long_multiples if name in FACTORED else [1.0]:
                parts += self._scores(self.reading_windows, name, [1.0], factor)
        return parts

    def _ablation_parts(self) -> list[Part]:
        lengths = list(dict.fromkeys([1.0, self.multiples[-1]]))
        return [part for name in self.ablations for part in self._scores(self.reading_windows, name, lengths)]

    def _task_parts(self) -> list[Part]:
        """Every task at every length; which triangle carries the answer, up to twice the training length."""
        parts = []
        for multiple in self._whole:
            length = self.length(multiple)
            positions = num_rows(length, self.training_length, self.task_samples) * length
            names: list[Intervention] = ["plain", *(self.ablations if multiple <= ABLATED_TASKS_UP_TO else ())]
            parts += [
                Part("task", multiple, name, task=task, positions=positions, length=length)
                for name in names
                for task in self.tasks
            ]
        return parts


def share_out(parts: Sequence[Part], num_ranks: int) -> list[list[Part]]:
    """Parts of every rank: the dearest first to whom has least, in the order of `parts` within a rank."""
    loads = [0.0] * num_ranks
    owner = {}
    for part in sorted(parts, key=lambda part: -part.cost):
        rank = loads.index(min(loads))
        owner[part.name] = rank
        loads[rank] += part.cost
    return [[part for part in parts if owner[part.name] == rank] for rank in range(num_ranks)]
