"""Everything that watches a run while it trains, behind one object: the trainer says where it is and what happened.

The watchdog, status.json and its events, metrics, the step clock, the profiler, the slow rank, memory. Nothing here
decides what is trained.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch
from pretrain.checkpoint.format import TrainingState
from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.run.attempt import Attempt
from pretrain.run.environment import write_environment
from pretrain.run.folder import RunFolder
from pretrain.training.cost.flops import FlopsPerToken, peak_flops
from pretrain.training.monitor.clock import StepClock, Stopwatch
from pretrain.training.monitor.metrics import Metrics, Straggler, Usage
from pretrain.training.monitor.norms import Inspection
from pretrain.training.monitor.peak_memory import PeakMemory
from pretrain.training.monitor.places import VALIDATING, Place
from pretrain.training.monitor.profiled_steps import requested_steps
from pretrain.training.monitor.profiler import StepProfiler
from pretrain.training.monitor.status_writer import StatusWriter
from pretrain.training.monitor.watchdog import Watchdog
from pretrain.training.ranks import Ranks, StopRequest
from pretrain.training.step_record import StepOutcome, StepRecord, StepTotals
from pretrain.training.zero.engine import Engine

Item = TypeVar("Item")
TOLD = (UserError, FloatingPointError, OSError)
"""Errors that are the run's own, which status.json tells."""


class Monitor:
    """The watch over one rank of a run. As a context it ends the watch, and tells of an error that ends the run."""

    def __init__(self, config: RunConfig, attempt: Attempt, ranks: Ranks, stop_request: StopRequest) -> None:
        """Begin to watch for hangs; metrics and clock begin with `begin`, when the run stands where it goes on."""
        self._config, self._ranks = config, ranks
        self._folder = RunFolder.of(config)
        self.attempt, self.stop_request = attempt, stop_request
        self._writer = StatusWriter(attempt, ranks.rank, ranks.world_size, config.training.tokens)
        self.status = self._writer.status
        self._watchdog = Watchdog(
            attempt,
            ranks.rank,
            ranks.world_size,
            config.supervision,
            stop_requested=lambda: stop_request.requested,
            on_hang=self._writer.interrupted,
        )
        self._profiler = StepProfiler(self._folder, requested_steps(), ranks.rank, ranks.device)
        self._straggler = Straggler()
        self.saved_step = 0
        """Step of the newest checkpoint."""
        self._has_trained = self._has_validated = False

    def measure_memory(self) -> None:
        """Take what this process holds now for nothing: the run's memory is what comes on top."""
        self._memory = PeakMemory(self._ranks.device)

    def begin(self, engine: Engine, state: TrainingState, flops: FlopsPerToken, planned_memory: int) -> None:
        """Begin metrics and clock after the step of `state`; records of later steps are dropped, they come again."""
        self.status.precision = engine.precision
        self._state, self._cold = state, True
        self._trouble: str | None = None
        self._writer.samples_lost = int(state.stream.lost.sum())
        device, ranks = self._ranks.device, self._ranks
        peak = peak_flops(ranks.device_name)
        self._metrics = Metrics(self._folder, state.step, flops, peak and peak * ranks.world_size, ranks.rank)
        self._metrics.planned_memory = planned_memory
        self._stopwatch, self._clock = Stopwatch(), StepClock(device)
        if not self._clock.on_gpu:
            engine.time_collectives(self._clock.section)
        if (before := self._folder.status()) is not None and before.step == state.step:
            self._writer.go_on_from(before)
        if ranks.rank == 0 and state.tokens_seen < self._config.training.tokens:
            write_environment(self._folder, ranks.world_size, engine.precision, ranks.device_name)

    def __enter__(self) -> "Monitor":
        self._show("training")
        self._stopwatch.lap()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, TOLD):
            self._writer.failed(error)
        self._watchdog.stop()

    # --------------------------------------------------------------------------------------- where the loop is

    @contextmanager
    def doing(self, place: Place) -> Iterator[StepClock]:
        """Tell the watchdog, the clock and the status that the loop is in this place; yields the clock."""
        self.note(place)
        if place.state is not None:
            self._show(place.state)
        with self._clock.section(place.section) if place.section else nullcontext():
            yield self._clock
        if place.state is not None:
            self._show("training")
            self._stopwatch.lap()

    def note(self, place: Place, *, patient: bool | None = None) -> None:
        """Tell the watchdog that the loop is in this place, or still moves in it."""
        state, slow = self._state, place.patient or self._cold if patient is None else patient
        unsaved = state.step != self.saved_step
        self._watchdog.note(state.step + 1, place.doing, patient=slow, unsaved=unsaved)

    def each_of(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of a validation; the watchdog hears of each that is done."""
        for batch in batches:
            yield batch
            self.note(VALIDATING, patient=not self._has_validated)

    def step_begins(self) -> None:
        """Begin to record the next step, where a profile of it is wanted."""
        self._clock.marked = self._profiler.begin(self._state.step + 1)

    def phase_begins(self, flops: FlopsPerToken) -> None:
        """Expect other shapes, for which blocks may be compiled again, and other costs."""
        self._cold = True
        self._metrics.flops = flops

    # --------------------------------------------------------------------------------------- what happened

    def event(self, text: str) -> None:
        """Write a line to the log and to the status."""
        self._writer.event(text)

    def inspection(self, engine: Engine) -> Inspection | None:
        """A look at the norms of the next step, if it is one that is logged."""
        return Inspection(engine) if (self._state.step + 1) % self._config.training.log_every == 0 else None

    def step_ended(
        self,
        state: TrainingState,
        totals: StepTotals,
        learning_rate: float,
        outcome: StepOutcome,
        inspection: Inspection | None,
        trouble: str | None,
    ) -> None:
        """Take up a step that brought the run to `state`; `trouble` is what is wrong since, for the status."""
        if not self._has_trained and self._ranks.rank == 0:
            self.attempt.trained_under(self._config)
        self._state, self._trouble, self._cold, self._has_trained = state, trouble, False, True
        squares, seconds = inspection.squares if inspection else None, self._stopwatch.lap()
        self._metrics.add(StepRecord(state.step, state.tokens_seen, totals, learning_rate, outcome, seconds, squares))
        self._writer.samples_lost_by(state.step, totals.samples_lost)
        if trace := self._profiler.end(state.step):
            self.event(trace)
            self._stopwatch.lap()

    def validated(self, sums: Tensor) -> None:
        """Record a validation: float32 [3], summed loss in nats, correct predictions, masked positions."""
        state, (loss_sum, correct, masked) = self._state, sums.tolist()
        loss, accuracy = loss_sum / max(masked, 1), correct / max(masked, 1)
        self._metrics.validation(state.step, state.tokens_seen, loss, accuracy)
        self._has_validated = True
        self.status.validation_loss, self.status.validation_step = loss, state.step
        self.event(f"step {state.step}: validation loss {loss:.4f}, masked accuracy {accuracy:.1%}")

    def saved(self, name: str, step: int) -> None:
        """Take up that a checkpoint is on the disk, saved now or before this start."""
        self.saved_step, self.status.checkpoint = step, name

    def went_back(self, state: TrainingState) -> None:
        """Take up that the run stands at an earlier step again; what was recorded after it is dropped."""
        self._state, self.saved_step = state, state.step
        self._metrics.go_back_to(state.step)
        self._stopwatch.lap()

    def flush(self) -> list[dict[str, Any]]:
        """Write the records since the last flush, summed over ranks, and return them; collective."""
        records = self._metrics.flush(Usage(self._clock.take(), self._memory.bytes()))
        if records:
            if slow := self._straggler.look(records[-1]):
                self.event(slow)
            self._writer.take_figures(records[-1])
            self._show("training")
        return records

    def recent_records(self) -> list[dict[str, Any]]:
        """The last records before this start, or before the step that the run went back to; collective."""
        box = [self._metrics.before]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self, state: str) -> None:
        """Write what is unfinished, and the state in which the run ends."""
        if trace := self._profiler.close(self._state.step):
            self.event(trace)
        self._metrics.close()
        self._show(state)

    def _show(self, doing: str) -> None:
        self._writer.show(doing, self._state, self._trouble)
