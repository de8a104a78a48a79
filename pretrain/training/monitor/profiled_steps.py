"""Which steps of a run are to be profiled: what a user may ask for, and how the ranks hear of it. Needs no torch."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.run import RunConfig
from pretrain.data.manifest import SplitEntry
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder

VARIABLE = "DIPTYCH_PROFILE"
"""The environment variable by which ranks get the steps, as `N:M`."""
MOST_STEPS = 100
"""More make a trace that no viewer opens."""


@dataclass(frozen=True)
class ProfiledSteps:
    """Steps `first` to `last`, both included; the first step of a run is 1."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> "ProfiledSteps":
        """Read `N:M`, or `N` for a single step.

        Raises:
            UserError: it is none.
        """
        first, colon, last = text.partition(":")
        numbers = (first, last) if colon else (first, first)
        if not all(number.isascii() and number.isdigit() for number in numbers):
            raise UserError(f"--profile {text}: expected the first and the last step, for instance 20:25")
        steps = cls(int(numbers[0]), int(numbers[1]))
        if steps.first < 1:
            raise UserError(f"--profile {text}: the first step of a run is 1")
        count = steps.last - steps.first + 1
        if count < 1:
            raise UserError(f"--profile {text}: the last step comes before the first; expected N:M with N <= M")
        if count > MOST_STEPS:
            raise UserError(f"--profile {text}: a trace of {count:,} steps is too large; at most {MOST_STEPS}")
        return steps

    def __str__(self) -> str:
        return f"{self.first}:{self.last}"


def requested_steps() -> ProfiledSteps | None:
    """What the launcher asks of this rank."""
    text = os.environ.get(VARIABLE)
    return ProfiledSteps.parse(text) if text else None


def traces(run: RunFolder, first: int) -> list[Path]:
    """Return the traces that begin at this step."""
    return sorted(run.profile.glob(f"rank-*.steps-{first}-*.pt.trace.json"))


def check_steps(steps: ProfiledSteps, config: RunConfig, train: SplitEntry, done: int) -> bool:
    """Whether a run that has `done` so many steps will come to these; False if it has, and their trace is there.

    Raises:
        UserError: it has and there is no trace, or it will end before.
    """
    if steps.first <= done:
        if traces(RunFolder.of(config), steps.first):
            return False
        raise UserError(f"--profile {steps}: the run is at step {done:,} already; profile steps from {done + 1:,} on")
    if steps.last > (most := most_steps(config, train)):
        raise UserError(f"--profile {steps}: {config.training.tokens:,} tokens take fewer than {most + 1:,} steps")
    return True


def most_steps(config: RunConfig, train: SplitEntry) -> int:
    """More steps than a run will have: rows hold no fewer tokens than if each held one document, or a piece of one.

    The lengths of documents are known only up to a factor of two; a half is added, since rows are drawn at random.
    """
    tokens_per_step = math.inf
    for phase in range(len(config.phases) + 1):
        of_phase = config.in_phase(phase)
        length = of_phase.data.sequence_length
        rows = sum(number * math.ceil((most + 2) / length) for most, number in train.length_histogram.items())
        tokens_per_step = min(tokens_per_step, of_phase.training.batch_size * train.tokens / max(rows, 1))
    return math.ceil(1.5 * config.training.tokens / max(tokens_per_step, 1))
