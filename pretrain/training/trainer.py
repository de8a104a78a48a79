"""The training loop, from the newest checkpoint to the last token."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import RunConfig, check_topology
from pretrain.data.loader import StepRows, training_steps, validation_batches
from pretrain.data.manifest import load_manifest
from pretrain.data.stream import StreamState
from pretrain.errors import EXIT_DONE, EXIT_RESUME_ME
from pretrain.model.encoder import MaskedLanguageModel
from pretrain.status import Status
from pretrain.training.attempt import agree_on_attempt
from pretrain.training.checkpoint import TrainingState, remove_leftovers
from pretrain.training.checkpoint_load import agree_on_checkpoint, load_checkpoint, newer_than
from pretrain.training.checkpoint_save import CheckpointSaver
from pretrain.training.engine import Engine
from pretrain.training.flops import flops_per_token, peak_flops
from pretrain.training.metrics import Metrics, StepRecord, Stopwatch
from pretrain.training.mock_step import mock_step
from pretrain.training.processes import StopRequest
from pretrain.training.run_folder import write_environment
from pretrain.training.schedule import learning_rate
from pretrain.training.step import StepTotals, agree_on_step, evaluate_batch, train_step

log = logging.getLogger(__name__)


class Trainer:
    """One rank of a run."""

    def __init__(
        self, config: RunConfig, rank: int, world_size: int, device: torch.device, stop_request: StopRequest
    ) -> None:
        check_topology(config, world_size)
        self.run, self.rank, self.world_size = config, rank, world_size
        self.config = config
        """As `run`, with the settings of the phase at hand."""
        self.stop_request = stop_request
        self.attempt = agree_on_attempt(config.run_folder)
        self.checkpoints = config.run_folder / "checkpoints"
        self.manifest = load_manifest(config.corpus.path)
        vocab_size = self.manifest.tokenizer.vocab_size

        torch.manual_seed(config.seed)
        model = MaskedLanguageModel(config.model, vocab_size)
        self.engine = Engine(model, config, world_size, device)
        mock_step(self.engine, config, vocab_size, world_size)
        self.status = Status(
            heartbeat=time.time(),
            total_tokens=config.training.tokens,
            attempt=self.attempt.number,
            ranks=world_size,
            precision=self.engine.precision,
        )
        self.state = self._resume()
        self._samples_lost = int(self.state.stream.lost.sum())

        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(device_name)
        flops = flops_per_token(config.model, vocab_size, config.data.sequence_length)
        self.metrics = Metrics(config.run_folder, self.state.step, flops, peak and peak * world_size, rank)
        self.stopwatch = Stopwatch()
        if rank == 0:
            write_environment(config.run_folder, world_size, self.engine.precision, device_name)

    def train(self) -> int:
        """Train to the last token, or to a stop; returns the exit code."""
        config = self.config.training
        steps = self._enter_phase()
        self._report("training")
        skipped_in_a_row = 0
        self.stopwatch.lap()
        while self.state.tokens_seen < config.tokens:
            rows = next(steps)
            lost = rows.state.lost[self.rank :: self.world_size].sum()
            totals = agree_on_step(rows.batch, int(lost), self.stop_request.requested)
            if totals.stop:
                return self._stop(steps)
            grad_norm = self._step(rows, totals)
            skipped_in_a_row = 0 if math.isfinite(grad_norm) else skipped_in_a_row + 1
            self._refuse_to_diverge(skipped_in_a_row)
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
        if self.state.step % config.validate_every:
            self._validate()
        self._save(last=True)
        self._close("done", steps)
        return EXIT_DONE

    def _enter_phase(self) -> Iterator[StepRows]:
        """Take the settings of the phase that the next step is in; returns its steps.

        What workers have read ahead under the settings before is dropped: the state goes with the rows that were
        trained on, so nothing is lost or repeated.
        """
        self._phase = self.run.phase_at(self.state.tokens_seen)
        self.config = config = self.run.in_phase(self._phase)
        self.engine.enter_phase(config, self.world_size)
        vocab_size = self.manifest.tokenizer.vocab_size
        self._log()
        self.metrics.flops = flops_per_token(config.model, vocab_size, config.data.sequence_length)
        self.state = replace(self.state, stream=self.state.stream.in_phase(self._phase))
        if self._phase:
            self._event(
                f"phase {self._phase} at {self.state.tokens_seen:,} tokens: rows of {config.data.sequence_length}, "
                f"{config.training.batch_size} a step, mask rate {config.data.mask_rate:g}, rotary theta "
                f"{config.model.rotary_theta:g}"
            )
        return training_steps(self.run, self.manifest, self.state.stream, self.rank, self.world_size)

    def _resume(self) -> TrainingState:
        """The state to go on from: that of the newest valid checkpoint, or the beginning."""
        if self.rank == 0:
            remove_leftovers(self.checkpoints)
        path, warnings = agree_on_checkpoint(self.checkpoints, strict=self.config.checkpoint.strict)
        for warning in warnings:
            self._event(warning)
        streams = self.config.data.streams
        self.saver = CheckpointSaver(
            self.checkpoints,
            self.engine,
            self.config.checkpoint,
            own_streams=range(self.rank, streams, self.world_size),
            guard=self.attempt.check,
            damaged=newer_than(path) if path else (),
        )
        if path is None:
            return TrainingState(0, 0, 0, StreamState.start(streams), self.manifest.fingerprint)
        state = load_checkpoint(path, self.engine)
        self.status.checkpoint = path.name
        self._event(f"resumed from {path.name}: {state.tokens_seen:,} tokens seen")
        if state.fingerprint != self.manifest.fingerprint or len(state.stream.visits) != streams:
            self._event("the corpus or its streams were changed: rows start over")
            return replace(state, stream=StreamState.start(streams), fingerprint=self.manifest.fingerprint)
        return state

    def _step(self, rows: StepRows, totals: StepTotals) -> float:
        """Take one step; returns the gradient norm, which is not finite if the step was skipped."""
        config = self.config
        tokens_seen = self.state.tokens_seen + totals.tokens
        rate = learning_rate(tokens_seen, config.training.tokens, config.optimizer.learning_rate, config.schedule)
        self.engine.set_learning_rate(rate)
        self._report_loss_of(totals.samples_lost)
        self.engine.see_tokens(self.state.tokens_seen)
        dropout_key = (config.seed, self.state.step, self.rank) if config.model.dropout else None
        micro_batch_size = config.training.micro_batch_size
        sums = train_step(self.engine, rows.batch, totals, micro_batch_size, self.world_size, dropout_key)
        grad_norm = self.engine.grad_norm
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
                tokens=totals.tokens,
                masked=totals.masked,
                rows_checksum=totals.rows_checksum,
                samples_lost=totals.samples_lost,
                learning_rate=rate,
                grad_norm=grad_norm,
                seconds=self.stopwatch.lap(),
                sums=sums,
            )
        )
        return grad_norm

    def _report_loss_of(self, samples: int) -> None:
        if samples > self._samples_lost:
            self._event(
                f"step {self.state.step + 1}: {samples - self._samples_lost:,} samples of damaged shards skipped, "
                f"{samples:,} in all; the ranks' logs name the shards"
            )
            self._samples_lost = samples

    def _refuse_to_diverge(self, skipped_in_a_row: int) -> None:
        if skipped_in_a_row == 0:
            return
        self._event(f"step {self.state.step} skipped: its gradient norm is not finite")
        if skipped_in_a_row >= self.config.training.max_skipped_steps:
            self.metrics.flush()
            self.saver.wait()
            self._report_saves()
            raise FloatingPointError(
                f"{skipped_in_a_row} steps in a row had a gradient norm that is not finite; weights and the last "
                "checkpoint are those before them. Lower optimizer.learning_rate or use training.precision=fp32"
            )

    def _validate(self) -> None:
        self._report("validating")
        self.engine.eval()
        self.engine.see_tokens(self.state.tokens_seen)
        sums = torch.zeros(3, device=self.engine.device)
        micro_batch_size = self.config.training.micro_batch_size
        for batch in validation_batches(self.config, self.manifest, self.rank, self.world_size, micro_batch_size):
            sums += evaluate_batch(self.engine, batch)
        self.engine.train()
        dist.all_reduce(sums)
        loss_sum, correct, masked = sums.tolist()
        loss, accuracy = loss_sum / max(masked, 1), correct / max(masked, 1)
        self.metrics.validation(self.state.step, self.state.tokens_seen, loss, accuracy)
        self.status.validation_loss, self.status.validation_step = loss, self.state.step
        self._event(f"step {self.state.step}: validation loss {loss:.4f}, masked accuracy {accuracy:.1%}")
        self._report("training")
        self.stopwatch.lap()

    def _save(self, *, last: bool = False) -> None:
        """Save; the last one of a run is on the disk when this returns."""
        self._log()
        self.attempt.check_together()
        self._report("saving")
        self.saver.save(self.state, at_once=last)
        error = self._report_saves()
        if last and error is not None:
            raise OSError(f"the run ends without its last steps: {error}")
        self._report("training")
        self.stopwatch.lap()

    def _report_saves(self) -> str | None:
        """Say which saves have ended, in the background too; returns what the last of them failed of, if it did."""
        error = None
        for result in self.saver.finished():
            error = result.error
            if error is None:
                self.status.checkpoint = result.name
                self._event(f"saved {result.name}")
            else:
                self._event(f"{result.name} could not be saved ({error}); earlier checkpoints are intact")
            if result.note:
                self._event(result.note)
        return error

    def _stop(self, steps: Iterator[StepRows]) -> int:
        """Somebody asked to stop: save, and ask to be resumed."""
        self._event(f"stopping at step {self.state.step} on {self.stop_request.signal_name or 'request'}")
        self._save(last=True)
        self._close("interrupted", steps)
        return EXIT_RESUME_ME

    def _close(self, state: str, steps: Iterator[StepRows]) -> None:
        del steps
        self.metrics.close()
        self._report(state)

    # ------------------------------------------------------------------------------------- what others see

    def _log(self) -> None:
        self.attempt.check_together()
        record = self.metrics.flush()
        if record is not None:
            self._report("training", record)

    def _event(self, text: str) -> None:
        log.info(text)
        self.status.events.append(text)

    def _report(self, state: str, record: dict[str, Any] | None = None) -> None:
        """Write status.json (rank 0), unless it is a newer attempt's by now."""
        if self.rank or self.attempt.superseded_by():
            return
        status = self.status
        status.state, status.step, status.tokens = state, self.state.step, self.state.tokens_seen
        if record is not None:
            status.loss, status.masked_accuracy = record["loss"], record["masked_accuracy"]
            status.learning_rate, status.tokens_per_s = record["learning_rate"], record["tokens_per_s"]
            status.flops_per_s, status.mfu = record["flops_per_s"], record.get("mfu")
            status.seconds_left = max(status.total_tokens - status.tokens, 0) / record["tokens_per_s"]
        status.beat(self.config.run_folder)
