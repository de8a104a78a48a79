"""The training loop, from the newest checkpoint to the last token."""

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch
from pretrain.checkpoint.folder import load_state, remove_leftovers
from pretrain.checkpoint.format import TrainingState
from pretrain.config.run import RunConfig
from pretrain.config.topology import check_topology
from pretrain.data.manifest import load_manifest
from pretrain.data.stream.loader import StepRows, training_steps, validation_batches
from pretrain.data.stream.state import StreamState
from pretrain.errors import EXIT_DONE, EXIT_RESUME_ME, UserError
from pretrain.run.attempt import agree_on_attempt
from pretrain.run.environment import write_environment
from pretrain.run.folder import RunFolder
from pretrain.training.collectives import any_rank
from pretrain.training.cost.flops import flops_per_token, peak_flops
from pretrain.training.guards import Guard
from pretrain.training.load import agree_on_checkpoint, load_checkpoint, newer_than
from pretrain.training.mock_step import mock_step
from pretrain.training.monitor.clock import StepClock, Stopwatch
from pretrain.training.monitor.diagnosis import AGREEING, READING
from pretrain.training.monitor.metrics import Metrics, StepRecord, Usage
from pretrain.training.monitor.norms import Inspection
from pretrain.training.monitor.peak_memory import PeakMemory
from pretrain.training.monitor.profiled_steps import requested_steps
from pretrain.training.monitor.profiler import StepProfiler
from pretrain.training.monitor.status_writer import Report
from pretrain.training.monitor.straggler import Straggler
from pretrain.training.monitor.watchdog import Watchdog
from pretrain.training.ranks import StopRequest
from pretrain.training.save import CheckpointSaver
from pretrain.training.schedule import learning_rate
from pretrain.training.step import StepTotals, agree_on_step, evaluate, train_step
from pretrain.training.zero.construction import build_model, load_deepspeed
from pretrain.training.zero.engine import Engine
from pretrain.training.zero.settings import ranks_per_node

MAX_ROLLBACKS = 3
"""Returns to the same checkpoint, before the run stops after all."""


class Trainer:
    """One rank of a run."""

    def __init__(
        self, config: RunConfig, rank: int, world_size: int, device: torch.device, stop_request: StopRequest
    ) -> None:
        check_topology(config, world_size, ranks_per_node(world_size))
        self.run, self.rank, self.world_size = config, rank, world_size
        self.data_rank = config.parallel.data_rank(rank, world_size)
        self.config = config
        """As `run`, with the settings of the phase at hand."""
        self.stop_request = stop_request
        folder = RunFolder.of(config)
        self.attempt = agree_on_attempt(folder)
        self.report = Report(self.attempt, rank, world_size, config.training.tokens)
        limits = (config.supervision.silence_s, config.supervision.long_silence_s)
        asked = partial(getattr, stop_request, "requested")
        self.watchdog = Watchdog(self.attempt, rank, world_size, *limits, asked, self.report.interrupted)
        self.checkpoints = folder.checkpoints
        self.manifest = load_manifest(config.corpus.path)
        vocab_size = self.manifest.tokenizer.vocab_size

        load_deepspeed(device)
        self.peak_memory = PeakMemory(device)
        torch.manual_seed(config.seed)
        model = build_model(config, vocab_size, world_size, device)
        self.engine = Engine(model, config, world_size, device)
        planned_memory = mock_step(self.engine, config, vocab_size, world_size)
        self.report.status.precision = self.engine.precision
        self._phase, self._is_cold = 0, True
        self.state = self._resume()
        self._saved_step, self._rollbacks = self.state.step, 0
        self.report.samples_lost = int(self.state.stream.lost.sum())

        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(device_name)
        flops = flops_per_token(config.model, vocab_size, config.data.sequence_length)
        self.metrics = Metrics(folder, self.state.step, flops, peak and peak * world_size, rank)
        self.metrics.planned_memory = planned_memory
        self.guard, self.straggler = Guard(config.training), Straggler()
        self._look_back()
        self.stopwatch, self.clock = Stopwatch(), StepClock(device)
        if not self.clock.on_gpu:
            self.engine.time_collectives(self.clock.section)
        self.profiler = StepProfiler(folder, requested_steps(), rank, device)
        if rank == 0:
            write_environment(folder, world_size, self.engine.precision, device_name)

    def train(self) -> int:
        """Train to the last token, or to a stop; returns the exit code."""
        try:
            return self._train()
        except (UserError, FloatingPointError, OSError) as error:
            self.report.failed(error)
            raise
        finally:
            self.watchdog.stop()

    def _train(self) -> int:
        config = self.config.training
        self._note("starting", patient=True)
        steps = self._enter_phase()
        self._progress("training")
        if self._validation_is_due:
            self._validate()
        self.stopwatch.lap()
        while self.state.tokens_seen < config.tokens:
            self.clock.marked = self.profiler.begin(self.state.step + 1)
            self._note(READING, patient=self._is_cold)
            with self.clock.section("data"):
                rows = next(steps)
            self._note(AGREEING, patient=self._is_cold)
            lost = rows.state.lost[self.data_rank.streams(len(rows.state.lost))].sum()
            with self.clock.section("communication"):
                totals = agree_on_step(rows.batch, int(lost), self.stop_request.requested, self.engine.sequence)
            if totals.stop:
                return self._stop(steps)
            self._note("computing", patient=self._is_cold)
            self._step(rows, totals)
            self._is_cold = False
            if trace := self.profiler.end(self.state.step):
                self.report.event(trace)
                self.stopwatch.lap()
            if self.guard.reason is not None:
                self._after_a_skipped_step()
            step = self.state.step
            if step % config.log_every == 0:
                self._log()
            self._report_saves()
            if step % config.validate_every == 0:
                self._validate()
            if step % self.config.checkpoint.every == 0:
                self._save()
            if self.run.phase_at(self.state.tokens_seen) != self._phase:
                steps = self._enter_phase()
        self._log()
        self._refuse_to_have_learned_nothing()
        at_end = self._validation_is_due or self.state.step % config.validate_every
        if at_end and not self._validate():
            return self._stop(steps)
        self._save(last=True)
        self._close("done", steps)
        return EXIT_DONE

    def _enter_phase(self) -> Iterator[StepRows]:
        """Take the settings of the phase that the next step is in; returns its steps.

        What workers have read ahead under the settings before is dropped: the state goes with the rows that were
        trained on, so nothing is lost or repeated.
        """
        self._phase = self.run.phase_at(self.state.tokens_seen)
        self._is_cold = True  # other shapes: blocks may be compiled again
        self.config = config = self.run.in_phase(self._phase)
        self.engine.enter_phase(config, self.world_size)
        vocab_size = self.manifest.tokenizer.vocab_size
        self._log()
        self.metrics.flops = flops_per_token(config.model, vocab_size, config.data.sequence_length)
        self.state = replace(self.state, stream=self.state.stream.in_phase(self._phase))
        if self._phase:
            self.report.event(
                f"phase {self._phase} at {self.state.tokens_seen:,} tokens: rows of {config.data.sequence_length}, "
                f"{config.training.batch_size} a step, mask rate {config.data.mask_rate:g}, rotary theta "
                f"{config.model.rotary_theta:g}"
            )
        return training_steps(self.run, self.manifest, self.state.stream, self.data_rank)

    def _resume(self) -> TrainingState:
        """The state to go on from: that of the newest valid checkpoint, or the beginning."""
        if self.rank == 0:
            remove_leftovers(self.checkpoints)
        path, warnings = agree_on_checkpoint(self.checkpoints, strict=self.config.checkpoint.strict)
        for warning in warnings:
            self.report.event(warning)
        streams = self.config.data.streams
        self.saver = CheckpointSaver(
            self.checkpoints,
            self.engine,
            self.config.checkpoint,
            own_streams=self.data_rank.streams(streams),
            guard=self.attempt.check,
            damaged=newer_than(path) if path else (),
        )
        if path is None:
            return TrainingState(0, 0, 0, StreamState.start(streams), self.manifest.fingerprint)
        state = load_checkpoint(path, self.engine)
        self.report.status.checkpoint = path.name
        self.report.event(f"resumed from {path.name}: {state.tokens_seen:,} tokens seen")
        if state.fingerprint != self.manifest.fingerprint or len(state.stream.visits) != streams:
            self.report.event("the corpus or its streams were changed: rows start over")
            return replace(state, stream=StreamState.start(streams), fingerprint=self.manifest.fingerprint)
        return state

    def _look_back(self) -> None:
        """Let the guard know the steps before, and see whether the validation of this one was cut off; collective."""
        box = [self.metrics.before]
        if dist.is_initialized():
            dist.broadcast_object_list(box, src=0)
        self.guard.replay(box[0], self._regime)
        step = self.state.step
        done = any("validation_loss" in record and record["step"] == step for record in box[0])
        self._validation_is_due = step > 0 and step % self.run.training.validate_every == 0 and not done

    def _regime(self, tokens_seen: int) -> Hashable:
        """Differs where losses cannot be compared."""
        dropping = self.run.model.drop_positions_after
        return self.run.phase_at(tokens_seen), dropping is not None and tokens_seen >= dropping

    def _step(self, rows: StepRows, totals: StepTotals) -> None:
        """Take one step, or skip it: then the guard has the reason."""
        config, guard = self.config, self.guard
        guard.enter(self._regime(self.state.tokens_seen))
        loss: float | None = None
        objection: str | None = None

        def refuse(sums: Tensor) -> bool:
            nonlocal loss, objection
            summed = sums[0].double()  # as in the metrics: in any order
            if dist.is_initialized():
                with self.clock.section("communication"):
                    dist.all_reduce(summed)
            loss = float(summed) / max(totals.masked, 1)
            objection = guard.objection(loss)
            return objection is not None

        tokens_seen = self.state.tokens_seen + totals.tokens
        rate = learning_rate(tokens_seen, config.training.tokens, config.optimizer.learning_rate, config.schedule)
        self.engine.set_learning_rate(rate)
        self.report.samples_lost_by(self.state.step + 1, totals.samples_lost)
        self.engine.see_tokens(self.state.tokens_seen)
        dropout_key = (config.seed, self.state.step, self.rank) if config.model.dropout else None
        inspection = Inspection(self.engine) if (self.state.step + 1) % config.training.log_every == 0 else None
        sums = train_step(
            self.engine,
            rows.batch,
            totals,
            config.training.micro_batch_size,
            self.world_size,
            dropout_key,
            refuse if config.training.spikes != "off" else None,
            self.clock,
            inspection,
        )
        grad_norm = self.engine.grad_norm
        if objection is None and not math.isfinite(grad_norm):
            objection = "its gradient norm is not finite"
        if objection is not None:
            guard.skip(objection)
        else:
            guard.taken()
            if loss is not None:
                guard.learn(loss)
        self.state = TrainingState(
            step=self.state.step + 1,
            tokens_seen=tokens_seen,
            optimizer_steps=self.engine.optimizer_steps,
            stream=rows.state,
            fingerprint=self.manifest.fingerprint,
        )
        self.metrics.add(
            StepRecord(
                step=self.state.step,
                tokens_seen=tokens_seen,
                totals=totals,
                learning_rate=rate,
                grad_norm=grad_norm,
                seconds=self.stopwatch.lap(),
                sums=sums,
                loss=loss,
                skipped=objection,
                squares=None if inspection is None else inspection.squares,
            )
        )

    def _after_a_skipped_step(self) -> None:
        guard = self.guard
        self.report.event(f"step {self.state.step} skipped: {guard.reason}")
        if not guard.must_stop:
            return
        if self.config.training.spikes == "rollback" and self._rollbacks < MAX_ROLLBACKS and self._roll_back():
            return
        self._log()
        self.saver.wait()
        self._report_saves()
        raise FloatingPointError(
            f"{guard.skipped_in_a_row} steps in a row were skipped, the last one because {guard.reason}; weights and "
            "the last checkpoint are those before them. Lower optimizer.learning_rate, use training.precision=fp32, "
            "or see training.spikes"
        )

    def _roll_back(self) -> bool:
        """Weights, moments and step of the last checkpoint, but the rows go on behind the offending ones.

        Not across the beginning of a phase, whose rows are others.
        """
        self.saver.wait()
        self._report_saves()
        path, warnings = agree_on_checkpoint(self.checkpoints, strict=self.config.checkpoint.strict)
        for warning in warnings:
            self.report.event(warning)
        if path is None or self.run.phase_at(load_state(path).tokens_seen) != self._phase:
            return False
        self._note("going back", patient=True)
        self._rollbacks += 1
        step = self.state.step
        self.state = replace(load_checkpoint(path, self.engine), stream=self.state.stream)
        self._saved_step = self.state.step
        self.metrics.go_back_to(self.state.step)
        self._look_back()
        self.report.event(f"step {step}: back to {path.name}, and on with the rows behind the offending ones")
        self.stopwatch.lap()
        return True

    def _refuse_to_have_learned_nothing(self) -> None:
        if self.state.optimizer_steps == 0:
            raise FloatingPointError(
                f"every one of the {self.state.step} steps was skipped, the last one because {self.guard.reason}: "
                "nothing was learned"
            )

    def _validate(self) -> bool:
        """Measure the validation loss; False if a stop request cut it off, which leaves it for the next start."""
        self._progress("validating")
        self.engine.see_tokens(self.state.tokens_seen)
        self._note("validating", patient=True)
        micro_batch_size = self.config.training.micro_batch_size
        batches = validation_batches(self.config, self.manifest, self.data_rank, micro_batch_size, any_rank)
        with self.clock.section("validation"):
            sums = evaluate(self.engine, self._noted(batches), lambda: any_rank(self.stop_request.requested))
        self._validation_is_due = sums is None
        if sums is None:
            self.report.event(f"step {self.state.step}: validation left for the next start")
            return False
        loss_sum, correct, masked = sums.tolist()
        loss, accuracy = loss_sum / max(masked, 1), correct / max(masked, 1)
        self.metrics.validation(self.state.step, self.state.tokens_seen, loss, accuracy)
        self.report.status.validation_loss, self.report.status.validation_step = loss, self.state.step
        self.report.event(f"step {self.state.step}: validation loss {loss:.4f}, masked accuracy {accuracy:.1%}")
        self._progress("training")
        self.stopwatch.lap()
        return True

    def _noted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of a validation; the watchdog hears of each that is done."""
        for batch in batches:
            yield batch
            self._note("validating", patient=self.report.status.validation_step is None)

    def _save(self, *, last: bool = False) -> None:
        """Save; the last one of a run is on the disk when this returns."""
        self._log()
        if self.state.step == self._saved_step:
            return  # it is there already, and is not to be written over
        self._note("saving", patient=True)
        self.attempt.check_together()
        self._progress("saving")
        with self.clock.section("saving"):
            self.saver.save(self.state, at_once=last)
        error = self._report_saves()
        if last and error is not None:
            raise OSError(f"the run ends without its last steps: {error}")
        self._progress("training")
        self.stopwatch.lap()

    def _report_saves(self) -> str | None:
        """Say which saves have ended, in the background too; returns what the last of them failed of, if it did."""
        error = None
        for result in self.saver.finished():
            error = result.error
            if error is None:
                self._saved_step, self._rollbacks = int(result.name.removeprefix("step-")), 0
                self.report.status.checkpoint = result.name
                self.report.event(f"saved {result.name}")
            else:
                self.report.event(f"{result.name} could not be saved ({error}); earlier checkpoints are intact")
            if result.note:
                self.report.event(result.note)
        return error

    def _stop(self, steps: Iterator[StepRows]) -> int:
        """Somebody asked to stop: save, and ask to be resumed."""
        self.report.event(f"stopping at step {self.state.step} on {self.stop_request.signal_name or 'request'}")
        self._save(last=True)
        self._close("interrupted", steps)
        return EXIT_RESUME_ME

    def _close(self, state: str, steps: Iterator[StepRows]) -> None:
        del steps
        if trace := self.profiler.close(self.state.step):
            self.report.event(trace)
        self.metrics.close()
        self._progress(state)

    # ------------------------------------------------------------------------------------- what others see

    def _note(self, doing: str, *, patient: bool = False) -> None:
        unsaved = self.state.step != self._saved_step
        self.watchdog.note(self.state.step + 1, doing, patient=patient, unsaved=unsaved)

    def _log(self) -> None:
        self.attempt.check_together()
        records = self.metrics.flush(Usage(self.clock.take(), self.peak_memory.bytes()))
        for record in records:
            if self.config.training.spikes == "off" and "skipped" not in record:
                self._learn(record)
        if records:
            if slow := self.straggler.look(records[-1]):
                self.report.event(slow)
            self._progress("training", records[-1])

    def _progress(self, doing: str, record: dict[str, Any] | None = None) -> None:
        self.report.progress(doing, self.state, self.guard, record)

    def _learn(self, record: dict[str, Any]) -> None:
        if objection := self.guard.objection(record["loss"]):
            self.report.event(f"step {record['step']} was taken although {objection}, since training.spikes is off")
        self.guard.learn(record["loss"])
