"""The checkpoints of a run in training, as all of its ranks use them: resume, save, report, go back."""

from dataclasses import replace
from pathlib import Path

from pretrain.checkpoint.folder import load_state, remove_leftovers, step_of
from pretrain.checkpoint.format import TrainingState
from pretrain.config.parallel import DataRank
from pretrain.config.run import RunConfig
from pretrain.data.stream.state import StreamState
from pretrain.run.folder import RunFolder
from pretrain.training.load import agree_on_checkpoint, load_checkpoint, newer_than
from pretrain.training.monitor.monitor import Monitor
from pretrain.training.monitor.places import GOING_BACK, SAVING
from pretrain.training.ranks import Ranks
from pretrain.training.save import CheckpointSaver
from pretrain.training.zero.engine import Engine

MAX_ROLLBACKS = 3
"""Number of returns to the same checkpoint, before the run stops after all."""


class RunCheckpoints:
    """Checkpoints of one run; every method is collective. What happens is told to the monitor."""

    def __init__(self, config: RunConfig, engine: Engine, ranks: Ranks, data_rank: DataRank, monitor: Monitor) -> None:
        self._config, self._engine, self._monitor = config, engine, monitor
        self._folder = RunFolder.of(config).checkpoints
        self._rollbacks = 0
        if ranks.rank == 0:
            remove_leftovers(self._folder)
        self._newest = self._find_newest()
        self._saver = CheckpointSaver(
            self._folder,
            engine,
            config.checkpoint,
            own_streams=data_rank.streams(config.data.streams),
            fence=monitor.attempt.check,
            damaged=newer_than(self._newest) if self._newest else (),
        )

    def resume(self, fingerprint: str) -> TrainingState:
        """Load the newest valid checkpoint; returns its state, or the beginning of a run where there is none.

        Rows start over where the corpus, by its `fingerprint`, or the number of streams is another.
        """
        streams, path = self._config.data.streams, self._newest
        if path is None:
            return TrainingState(0, 0, 0, StreamState.start(streams), fingerprint)
        state = load_checkpoint(path, self._engine)
        self._monitor.saved(path.name, state.step)
        self._monitor.event(f"resumed from {path.name}: {state.tokens_seen:,} tokens seen")
        if state.fingerprint != fingerprint or len(state.stream.visits) != streams:
            self._monitor.event("the corpus or its streams were changed: rows start over")
            return replace(state, stream=StreamState.start(streams), fingerprint=fingerprint)
        return state

    def save(self, state: TrainingState, *, last: bool = False) -> None:
        """Save, unless this step is on the disk already; the `last` one of a run is when this returns.

        Raises:
            OSError: the last one could not be saved.
        """
        if state.step == self._monitor.saved_step:
            return
        with self._monitor.doing(SAVING):
            self._monitor.attempt.check_together()
            self._saver.save(state, at_once=last)
            error = self.report()
            if last and error is not None:
                raise OSError(f"the run ends without its last steps: {error}")

    def report(self) -> str | None:
        """Tell which saves have ended, also in the background; returns why the last of them failed, if it did."""
        error = None
        for result in self._saver.finished():
            error = result.error
            if error is None:
                self._rollbacks = 0
                self._monitor.saved(result.name, step_of(self._folder / result.name))
                self._monitor.event(f"saved {result.name}")
            else:
                self._monitor.event(f"{result.name} could not be saved ({error}); earlier checkpoints are intact")
            if result.note:
                self._monitor.event(result.note)
        return error

    def wait(self) -> None:
        """Return when no save is under way, having told how it ended."""
        self._saver.wait()
        self.report()

    def go_back(self, state: TrainingState, phase: int) -> TrainingState | None:
        """Load weights, moments and step of the last checkpoint; rows go on behind those of `state`.

        Returns:
            The state to go on from; None where there is no checkpoint of this `phase`, whose rows are alike, or the run
            came back to it `MAX_ROLLBACKS` times already.
        """
        self.wait()
        if self._rollbacks == MAX_ROLLBACKS:
            return None
        path = self._find_newest()
        if path is None or self._config.phase_at(load_state(path).tokens_seen) != phase:
            return None
        self._monitor.note(GOING_BACK)
        self._rollbacks += 1
        earlier = replace(load_checkpoint(path, self._engine), stream=state.stream)
        self._monitor.went_back(earlier)
        self._monitor.event(f"step {state.step}: back to {path.name}, and on with the rows behind the offending ones")
        return earlier

    def _find_newest(self) -> Path | None:
        path, warnings = agree_on_checkpoint(self._folder, strict=self._config.checkpoint.strict)
        for warning in warnings:
            self._monitor.event(warning)
        return path
