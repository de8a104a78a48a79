"""The parts that ranks have computed (work.py), put together: the scores of every target, its window and document.

The same masked tokens are predicted from longer and longer windows (windows.py), so a difference between two lengths
is due to the context and nothing else, and the window of the training length is the crop control of all longer ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pretrain.data.arrays import Flags, Floats
from pretrain.errors import UserError
from pretrain.evaluation.context.interventions import FACTORED
from pretrain.evaluation.context.plan import Part, PartKind
from pretrain.evaluation.context.results.statistics import DocumentBootstrap
from pretrain.evaluation.context.session import Session
from pretrain.evaluation.context.windows import WindowRows, make_rows
from pretrain.evaluation.context.work import Arrays, load_part
from pretrain.evaluation.report.titles import Intervention


@dataclass(frozen=True)
class Scores:
    """What an encoder scored at every target of some windows, in the order of the windows."""

    losses: Floats
    correct: Flags


class Evaluation:
    """The parts of a finished plan, put together."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.plan, self._folder = session, session.plan, folder
        self._parts: dict[tuple[object, ...], list[Part]] = {}
        for part in self.plan.parts():
            self._parts.setdefault((part.kind, part.task, part.intervention, part.multiple, part.factor), []).append(
                part
            )
        self._loaded: dict[str, Arrays] = {}
        self.skipped = dict(self.plan.skipped)
        self.multiples: list[float] = []
        for multiple in self.plan.multiples:
            if why := self._why_skipped(multiple):
                self.skipped[f"{multiple:g}x"] = why
            else:
                self.multiples.append(multiple)
        if 1.0 not in self.multiples:
            raise UserError(f"not even the training length can be measured: {self.skipped['1x']}")

    def _why_skipped(self, multiple: float) -> str | None:
        return next((str(arrays["skipped"]) for arrays in self.plain_arrays(multiple) if "skipped" in arrays), None)

    def _arrays(self, part: Part) -> Arrays:
        if part.name not in self._loaded:
            self._loaded[part.name] = load_part(self._folder, self.plan, part)
        return self._loaded[part.name]

    def scores(self, intervention: Intervention, multiple: float, factor: float = 1.0) -> Scores | None:
        """Return the scores of all windows under an intervention; None where they did not fit or were not planned."""
        key = ("scores", None, intervention, multiple, factor if intervention in FACTORED else 1.0)
        arrays = [self._arrays(part) for part in self._parts.get(key, [])]
        if not arrays or any("skipped" in a for a in arrays):
            return None
        losses = np.concatenate([a["losses"] for a in arrays]).astype(np.float64)
        return Scores(losses, np.concatenate([a["correct"] for a in arrays]))

    def plain(self, multiple: float) -> Scores:
        """Return the scores of the encoder as trained, at one of `multiples`."""
        scores = self.scores("plain", multiple)
        assert scores is not None
        return scores

    def plain_arrays(self, multiple: float) -> list[Arrays]:
        """Return what was computed for the encoder as trained, part by part."""
        return [self._arrays(part) for part in self._parts["scores", None, "plain", multiple, 1.0]]

    def of_kind(self, kind: PartKind) -> Iterator[tuple[Part, Arrays]]:
        """Yield the parts of a kind that could be measured, with what was computed."""
        for part in self.plan.parts():
            if part.kind == kind and part.multiple in self.multiples and "skipped" not in (a := self._arrays(part)):
                yield part, a

    def rows(self, multiple: float) -> WindowRows:
        """The rows of all windows at a length."""
        plan, session = self.plan, self.session
        return make_rows(session.windows, plan.length(multiple), plan.training_length, session.rule, plan.seed)

    @cached_property
    def targets(self) -> npt.NDArray[np.int64]:
        """Ids to be predicted."""
        targets = self.rows(1.0).targets
        return targets[targets >= 0]

    @cached_property
    def window_of_target(self) -> npt.NDArray[np.int64]:
        """Number of the window of every target."""
        return np.nonzero(self.rows(1.0).targets >= 0)[0]

    @cached_property
    def documents(self) -> npt.NDArray[np.int64]:
        """Document of every target."""
        return np.array([window.document for window in self.session.windows])[self.window_of_target]

    @cached_property
    def bootstrap(self) -> DocumentBootstrap:
        """Means over all targets."""
        return DocumentBootstrap(self.documents, self.plan.seed)

    def first_targets(self, windows: int) -> Flags:
        """bool [targets]: whether a target is of the first windows."""
        return self.window_of_target < windows
