"""The training loop: from the newest checkpoint to the last token."""

from collections.abc import Hashable, Iterator
from dataclasses import replace

import torch

from pretrain.config.run import RunConfig
from pretrain.config.topology import check_topology
from pretrain.data.manifest import load_manifest
from pretrain.data.stream.loader import StepRows, training_steps, validation_batches
from pretrain.errors import EXIT_DONE, EXIT_RESUME_ME
from pretrain.training.checkpoints import RunCheckpoints
from pretrain.training.collectives import agree_on_step, any_rank
from pretrain.training.cost.flops import FlopsPerToken, flops_per_token
from pretrain.training.guards import Guard
from pretrain.training.mock_step import mock_step
from pretrain.training.monitor.monitor import Monitor
from pretrain.training.monitor.places import AGREEING, COMPUTING, READING, VALIDATING
from pretrain.training.ranks import Ranks
from pretrain.training.schedule import learning_rate
from pretrain.training.step import evaluate_batches, train_step
from pretrain.training.step_record import StepTotals
from pretrain.training.zero.construction import build_model, load_deepspeed
from pretrain.training.zero.engine import Engine
from pretrain.training.zero.settings import ranks_per_node


class Trainer:
    """One rank of a run. All ranks make the same calls: nearly every method is collective."""

    def __init__(self, config: RunConfig, ranks: Ranks, monitor: Monitor) -> None:
        """Build the model, take a mock step, and resume where an earlier start ended.

        Raises:
            UserError: the run does not fit these ranks or their memory, or its checkpoints are damaged or of another
                model.
        """
        check_topology(config, ranks.world_size, ranks_per_node(ranks.world_size))
        self.base_config, self.ranks, self.monitor = config, ranks, monitor
        self.phase_config = config
        """Config of the run, with the settings of the phase at hand."""
        self.data_rank = config.parallel.data_rank(ranks.rank, ranks.world_size)
        self.manifest = load_manifest(config.corpus.path)
        self.guard = Guard(config.training)

        load_deepspeed(ranks.device)
        monitor.measure_memory()
        torch.manual_seed(config.seed)
        model = build_model(config, self.vocab_size, ranks.world_size, ranks.device)
        self.engine = Engine(model, config, ranks.world_size, ranks.device)
        planned_memory = mock_step(self.engine, config, self.vocab_size)
        self.checkpoints = RunCheckpoints(config, self.engine, ranks, self.data_rank, monitor)
        self.state = self.checkpoints.resume(self.manifest.fingerprint)
        monitor.begin(self.engine, self.state, self.flops, planned_memory)
        self.look_back()

    def fit(self) -> int:
        """Train to the last token, or to a stop; returns the exit code."""
        with self.monitor:
            steps = self.enter_phase()
            if not self.is_validated and self.state.step % self.base_config.training.validate_every == 0:
                self.validate()  # cut off at the stop before this start
            while self.state.tokens_seen < self.base_config.training.tokens:
                rows = self.read(steps)
                totals = self.agree(rows)
                if totals.stop:
                    return self.stop()
                self.take(rows, totals)
                self.do_what_is_due()
                if self.phase_is_over:
                    steps = self.enter_phase()
            return self.finish()

    # ---------------------------------------------------------------------------------------------------- a step

    def read(self, steps: Iterator[StepRows]) -> StepRows:
        """Return this rank's rows of the next step."""
        self.monitor.step_begins()
        with self.monitor.doing(READING):
            return next(steps)

    def agree(self, rows: StepRows) -> StepTotals:
        """Sum up what all ranks are about to train on, and whether one of them was asked to stop."""
        with self.monitor.doing(AGREEING):
            lost = rows.state.lost[self.data_rank.streams(len(rows.state.lost))].sum()
            stop = self.monitor.stop_request.requested
            return agree_on_step(rows.batch, int(lost), stop, self.engine.sequence)

    def take(self, rows: StepRows, totals: StepTotals) -> None:
        """Take one step, or skip it where its loss or its gradients are not to be learned from."""
        config, before = self.phase_config, self.state
        tokens_seen = before.tokens_seen + totals.tokens
        rate = learning_rate(tokens_seen, config.training.tokens, config.optimizer.learning_rate, config.schedule)
        self.engine.set_learning_rate(rate)
        self.engine.set_tokens_seen(before.tokens_seen)
        self.guard.enter(self.regime(before.tokens_seen))
        inspection = self.monitor.inspection(self.engine)
        with self.monitor.doing(COMPUTING) as clock:
            guard = self.guard if self.guard.looks_first else None
            outcome = train_step(
                self.engine, rows.batch, totals, before.step, guard=guard, clock=clock, inspection=inspection
            )
        self.guard.count(outcome.skipped, outcome.loss)
        self.state = replace(
            before,
            step=before.step + 1,
            tokens_seen=tokens_seen,
            optimizer_steps=self.engine.optimizer_steps,
            stream=rows.state,
        )
        self.monitor.step_ended(self.state, totals, rate, outcome, inspection, self.guard.trouble)

    def do_what_is_due(self) -> None:
        """Log, validate and save after the steps whose turn it is; see to a skipped step first."""
        if self.guard.reason is not None:
            self.after_a_skipped_step()
        step, config = self.state.step, self.base_config
        if step % config.training.log_every == 0:
            self.log()
        self.checkpoints.report()
        if step % config.training.validate_every == 0:
            self.validate()
        if step % config.checkpoint.every == 0:
            self.save()

    def after_a_skipped_step(self) -> None:
        """Tell of it; after too many in a row go back to a checkpoint, or stop.

        Raises:
            FloatingPointError: too many in a row, and there is nothing to go back to, or it is not wanted.
        """
        guard = self.guard
        self.monitor.event(f"step {self.state.step} skipped: {guard.reason}")
        if not guard.must_stop or (self.base_config.training.spikes == "rollback" and self.roll_back()):
            return
        self.log()
        self.checkpoints.wait()
        raise FloatingPointError(
            f"{guard.skipped_in_a_row} steps in a row were skipped, the last one because {guard.reason}; weights and "
            "the last checkpoint are those before them. Lower optimizer.learning_rate, use training.precision=fp32, "
            "or see training.spikes"
        )

    def roll_back(self) -> bool:
        """Go on from the last checkpoint with the rows behind the offending ones; False if that cannot be."""
        state = self.checkpoints.go_back(self.state, self.phase)
        if state is None:
            return False
        self.state = state
        self.look_back()
        return True

    def log(self) -> None:
        """Write the metrics of the steps since the last time."""
        self.monitor.attempt.check_together()
        for line in self.guard.review(self.monitor.flush()):
            self.monitor.event(line)

    def validate(self) -> bool:
        """Measure the validation loss; False if a stop request cut it off, which leaves it for the next start."""
        config = self.phase_config
        self.engine.set_tokens_seen(self.state.tokens_seen)
        with self.monitor.doing(VALIDATING):
            batches = validation_batches(
                config, self.manifest, self.data_rank, config.training.micro_batch_size, on_any_rank=any_rank
            )
            stop = self.monitor.stop_request
            sums = evaluate_batches(self.engine, self.monitor.each_of(batches), lambda: any_rank(stop.requested))
            if sums is None:
                self.monitor.event(f"step {self.state.step}: validation left for the next start")
            else:
                self.monitor.validated(sums)
                self.validated_step = self.state.step
        return sums is not None

    def save(self, *, last: bool = False) -> None:
        """Save, with all metrics up to here written."""
        self.log()
        self.checkpoints.save(self.state, last=last)

    # ----------------------------------------------------------------------------------------- phases, and the end

    @property
    def phase_is_over(self) -> bool:
        """Whether the next step belongs to another phase than the last."""
        return self.base_config.phase_at(self.state.tokens_seen) != self.phase

    def enter_phase(self) -> Iterator[StepRows]:
        """Take the settings of the phase that the next step is in; returns its steps.

        What workers have read ahead under the settings before is dropped: the state goes with the rows that were
        trained on, so nothing is lost or repeated.
        """
        self.phase = phase = self.base_config.phase_at(self.state.tokens_seen)
        self.phase_config = config = self.base_config.in_phase(phase)
        self.engine.enter_phase(config)
        self.log()
        self.monitor.phase_begins(self.flops)
        self.state = replace(self.state, stream=self.state.stream.in_phase(phase))
        if phase:
            self.monitor.event(
                f"phase {phase} at {self.state.tokens_seen:,} tokens: rows of {config.data.sequence_length}, "
                f"{config.training.batch_size} a step, mask rate {config.data.mask_rate:g}, rotary theta "
                f"{config.model.rotary_theta:g}"
            )
        return training_steps(self.base_config, self.manifest, self.state.stream, self.data_rank)

    def look_back(self) -> None:
        """Let the guard know the steps before, and see which of them was validated last."""
        records = self.monitor.recent_records()
        self.guard.replay(records, self.regime)
        self.validated_step = max((record["step"] for record in records if "validation_loss" in record), default=0)

    @property
    def is_validated(self) -> bool:
        """Whether the validation loss of this step is recorded, now or by an earlier start."""
        return self.validated_step == self.state.step

    def regime(self, tokens_seen: int) -> Hashable:
        """Differs where losses cannot be compared: between phases, and once positions are dropped."""
        dropping = self.base_config.model.drop_positions_after
        return self.base_config.phase_at(tokens_seen), dropping is not None and tokens_seen >= dropping

    @property
    def vocab_size(self) -> int:
        """Number of the tokenizer's pieces."""
        return self.manifest.tokenizer.vocab_size

    @property
    def flops(self) -> FlopsPerToken:
        """Floating-point operations of a token in the phase at hand."""
        config = self.phase_config
        return flops_per_token(config.model, self.vocab_size, config.data.sequence_length)

    def stop(self) -> int:
        """Save because somebody asked to stop; returns the exit code that asks to be resumed."""
        name = self.monitor.stop_request.signal_name or "request"
        self.monitor.event(f"stopping at step {self.state.step} on {name}")
        self.save(last=True)
        self.monitor.close("interrupted")
        return EXIT_RESUME_ME

    def finish(self) -> int:
        """Validate and save after the last token; returns the exit code.

        Raises:
            FloatingPointError: every step was skipped.
        """
        self.log()
        if self.state.optimizer_steps == 0:
            raise FloatingPointError(
                f"every one of the {self.state.step} steps was skipped, the last one because {self.guard.reason}: "
                "nothing was learned"
            )
        if not self.is_validated and not self.validate():
            return self.stop()
        self.save(last=True)
        self.monitor.close("done")
        return EXIT_DONE
