"""metrics.jsonl and TensorBoard: one record a step, gathered from the ranks only every few steps.

Until then a step's sums stay on the device, so that recording costs no synchronisation.
"""

import json
import os
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from pretrain.files import write_text
from pretrain.run.folder import RunFolder
from pretrain.training.cost.flops import FlopsPerToken
from pretrain.training.monitor.clock import Timing, shares
from pretrain.training.monitor.norms import summarize_squares
from pretrain.training.step_record import StepRecord

KEPT_BEFORE = 512
"""Records of earlier steps that a start may look at."""


@dataclass(frozen=True)
class Usage:
    """What the steps of a flush have cost this rank."""

    timing: Timing
    peak_memory: int | None
    """Bytes, since the run started; None where the system does not tell."""


class _Gathered(NamedTuple):
    """Figures of all ranks."""

    sums: list[list[float]]
    """Summed loss and correct predictions of each step."""
    ranks: list[list[float]]
    """Seconds in all, seconds in each of SECTIONS, bytes at the peak (-1: not known) of each rank."""
    squares: list[list[float]] | None
    """Sums of squares of the last step, if it was inspected."""


class Metrics:
    """Collects step records; rank 0 writes them."""

    def __init__(self, run: RunFolder, step: int, flops: FlopsPerToken, peak: float | None, rank: int) -> None:
        """Continue after `step`: what an interrupted run recorded later than that is dropped, it will be run again.

        Args:
            run: whose metrics these are.
            step: the last step that counts.
            flops: of a token.
            peak: FLOP/s of all devices together, or None where it is not known.
            rank: of this process.
        """
        self._run, self._peak, self._rank = run, peak, rank
        self.flops = flops
        self.planned_memory: int | None = None
        """Bytes that a rank should need at most, if they are known."""
        self._pending: list[StepRecord] = []
        self.before: list[dict[str, Any]] = []
        """The last records that were there already (rank 0)."""
        self._begin_after(step)

    def _begin_after(self, step: int) -> None:
        """The file is replaced, so that what an older attempt still writes goes nowhere."""
        if self._rank == 0:
            self.before = _drop_after(self._run, step)[-KEPT_BEFORE:]
            self._file = self._run.metrics_file.open("a", encoding="utf-8")
            self._board = SummaryWriter(self._run.tensorboard, purge_step=step + 1)

    def go_back_to(self, step: int) -> None:
        """Drop what was recorded after `step`: the run continues from there."""
        self._pending = []
        self.close()
        self._begin_after(step)

    def add(self, record: StepRecord) -> None:
        """Keep a step's record until the next flush."""
        self._pending.append(record)

    def flush(self, usage: Usage) -> list[dict[str, Any]]:
        """Sum over ranks and write; collective. Returns the records, the last with what all of them cost."""
        if not self._pending:
            return []
        records, self._pending = self._pending, []
        gathered = self._gather(records, usage)
        written = [self._of_step(*pair) for pair in zip(records, gathered.sums, strict=True)]
        last = written[-1]
        last |= self._speed(records) | self._of_ranks(gathered.ranks, usage.timing.on_gpu)
        if gathered.squares is not None and records[-1].outcome.skipped is None:
            last |= summarize_squares(gathered.squares)
        for record in written:
            self._write(record)
        self._scalars("train", last)
        self._flush_file()
        return written

    def _gather(self, records: list[StepRecord], usage: Usage) -> "_Gathered":
        """Sums over ranks, and what every rank has to say of itself; one all-reduce."""
        sums = torch.stack([record.outcome.sums for record in records])
        squares = records[-1].squares
        timing = usage.timing
        own = [timing.elapsed, *timing.seconds, -1.0 if usage.peak_memory is None else usage.peak_memory]
        rank, world_size = (self._rank, dist.get_world_size()) if dist.is_initialized() else (0, 1)
        ranks = torch.zeros(world_size, len(own), dtype=torch.float64)
        ranks[rank] = torch.tensor(own, dtype=torch.float64)
        # In float64, where the order of adding a few float32 does not matter: a ring adds the ranks in an order that
        # differs by place in the buffer, and so by how many steps a stop left to this flush.
        parts = [sums.double(), ranks.to(sums.device), *([] if squares is None else [squares.to(sums.device)])]
        both = torch.cat([part.flatten() for part in parts])
        if dist.is_initialized():
            dist.all_reduce(both)
        flat = both.cpu().split([part.numel() for part in parts])
        summed = [part.view(like.shape).tolist() for part, like in zip(flat, parts, strict=True)]
        return _Gathered(summed[0], summed[1], summed[2] if squares is not None else None)

    @staticmethod
    def _of_step(record: StepRecord, sums: list[float]) -> dict[str, Any]:
        outcome, (loss_sum, correct) = record.outcome, sums
        line: dict[str, Any] = {
            "step": record.step,
            "tokens": record.tokens_seen,
            "loss": loss_sum / max(record.totals.masked, 1) if outcome.loss is None else outcome.loss,
            "masked_accuracy": correct / max(record.totals.masked, 1),
            "grad_norm": outcome.grad_norm,
            "learning_rate": record.learning_rate,
            "masked": record.totals.masked,
            "rows_checksum": f"{record.totals.rows_checksum:016x}",
            "seconds": round(record.seconds, 6),
        }
        if record.totals.samples_lost:
            line["samples_lost"] = record.totals.samples_lost
        if outcome.skipped:
            line["skipped"] = outcome.skipped
        return line

    def _speed(self, records: list[StepRecord]) -> dict[str, Any]:
        """Speed of some steps together; validation and saving between them are not counted."""
        seconds = max(sum(r.seconds for r in records), 1e-9)
        tokens, masked = sum(r.totals.tokens for r in records), sum(r.totals.masked for r in records)
        rate = masked / max(tokens, 1)
        flops_per_s = tokens * self.flops.total(rate) / seconds
        speed: dict[str, Any] = {
            "tokens_per_s": tokens / seconds,
            "masked_tokens_per_s": masked / seconds,
            "flops_per_s": flops_per_s,
        }
        if self._peak:
            as_full = tokens * self.flops.total_as_full(rate) / seconds
            speed |= {"mfu": flops_per_s / self._peak, "mfu_triangles_as_full": as_full / self._peak}
        return speed

    def _of_ranks(self, ranks: list[list[float]], on_gpu: bool) -> dict[str, Any]:
        """Shares of the time on the average rank, the largest peak of memory, and the slowest rank."""
        timings = [Timing(elapsed, tuple(seconds), on_gpu) for elapsed, *seconds, _ in ranks]
        line: dict[str, Any] = {"time_shares": shares(timings)}
        if (peak := max(int(of_rank[-1]) for of_rank in ranks)) >= 0:
            line["peak_memory_bytes"] = peak
        if self.planned_memory is not None:
            line["planned_memory_bytes"] = self.planned_memory
        return line | (slowest([timing.own for timing in timings]) if len(ranks) > 1 else {})

    def validation(self, step: int, tokens: int, loss: float, masked_accuracy: float) -> None:
        """Record a validation."""
        record = {
            "step": step,
            "tokens": tokens,
            "validation_loss": loss,
            "validation_masked_accuracy": masked_accuracy,
        }
        self._write(record)
        self._scalars("validation", {"step": step, "loss": loss, "masked_accuracy": masked_accuracy})
        self._flush_file()

    def _write(self, record: dict[str, Any]) -> None:
        if self._rank == 0:
            self._file.write(json.dumps(record) + "\n")

    def _scalars(self, group: str, record: dict[str, Any]) -> None:
        if self._rank == 0:
            for key in record.keys() - {"step", "rows_checksum", "seconds", "masked", "skipped", "slowest_rank"}:
                of_key = record[key] if isinstance(record[key], dict) else {"": record[key]}
                for part, value in of_key.items():
                    self._board.add_scalar("/".join(filter(None, [group, key, part])), value, record["step"])

    def _flush_file(self) -> None:
        if self._rank == 0:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Flush and close the files."""
        if self._rank == 0:
            self._file.close()
            self._board.close()


def _drop_after(run: RunFolder, step: int) -> list[dict[str, Any]]:
    kept = [record for record in run.metrics() if record["step"] <= step]
    write_text(run.metrics_file, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def slowest(own: list[float]) -> dict[str, Any]:
    """The rank that needed the longest by itself, and how many times the median of the others that was."""
    rank = max(range(len(own)), key=own.__getitem__)
    others = statistics.median(own[:rank] + own[rank + 1 :])
    return {"slowest_rank": rank, "slowest_by": round(own[rank] / max(others, 1e-9), 3)}


class Straggler:
    """Tells when the same rank has been much slower than the others for a while."""

    FACTOR, TIMES = 1.5, 5

    def __init__(self) -> None:
        self._rank: int | None = None
        self._times = 0

    def look(self, record: dict[str, Any]) -> str | None:
        """Given each flushed record; a line when it is the `TIMES`th in a row to name the same rank."""
        slow = record["slowest_rank"] if record.get("slowest_by", 0) >= self.FACTOR else None
        self._times = self._times + 1 if slow == self._rank else 1
        self._rank = slow
        if slow is None or self._times != self.TIMES:
            return None
        return (
            f"rank {slow} is slow: for reading rows and its forward passes it needs {record['slowest_by']:.1f} times "
            "what the others need; they wait for it in every step"
        )
