"""metrics.jsonl and TensorBoard: one record a step, gathered from the ranks only every few steps.

Until then a step's sums stay on the device, so that recording costs no synchronisation.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pretrain.training.flops import FlopsPerToken


@dataclass(frozen=True)
class StepRecord:
    """A step that was taken; `sums` is this rank's float32 [2]: summed loss in nats, correct predictions."""

    step: int
    tokens_seen: int
    tokens: int
    masked: int
    rows_checksum: int
    samples_lost: int
    learning_rate: float
    grad_norm: float
    seconds: float
    sums: Tensor


class Metrics:
    """Collects step records; rank 0 writes them."""

    def __init__(self, folder: Path, step: int, flops: FlopsPerToken, peak: float | None, rank: int) -> None:
        """Continue after `step`: what an interrupted run recorded later than that is dropped, it will be run again.

        Args:
            folder: the run folder.
            step: the last step that counts.
            flops: of a token.
            peak: FLOP/s of all devices together, or None where it is not known.
            rank: of this process.
        """
        self._folder, self._peak, self._rank = folder, peak, rank
        self.flops = flops
        self._pending: list[StepRecord] = []
        if rank == 0:
            _drop_after(folder / "metrics.jsonl", step)
            self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
            self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def add(self, record: StepRecord) -> None:
        """Keep a step's record until the next flush."""
        self._pending.append(record)

    def flush(self) -> dict[str, Any] | None:
        """Sum over ranks and write; collective. Returns the last step's record, with speeds over all flushed steps."""
        if not self._pending:
            return None
        records, self._pending = self._pending, []
        sums = torch.stack([record.sums for record in records])
        if dist.is_initialized():
            dist.all_reduce(sums)
        seconds = max(sum(r.seconds for r in records), 1e-9)
        tokens, masked = sum(r.tokens for r in records), sum(r.masked for r in records)
        rate = masked / max(tokens, 1)
        flops_per_s = tokens * self.flops.total(rate) / seconds
        speed: dict[str, Any] = {"tokens_per_s": tokens / seconds, "flops_per_s": flops_per_s}
        if self._peak:
            as_full = tokens * self.flops.total_as_full(rate) / seconds
            speed |= {"mfu": flops_per_s / self._peak, "mfu_triangles_as_full": as_full / self._peak}
        last: dict[str, Any] = {}
        for record, (loss_sum, correct) in zip(records, sums.tolist(), strict=True):
            last = {
                "step": record.step,
                "tokens": record.tokens_seen,
                "loss": loss_sum / max(record.masked, 1),
                "masked_accuracy": correct / max(record.masked, 1),
                "grad_norm": record.grad_norm,
                "learning_rate": record.learning_rate,
                "masked": record.masked,
                "rows_checksum": f"{record.rows_checksum:016x}",
                "seconds": round(record.seconds, 6),
            }
            if record.samples_lost:
                last["samples_lost"] = record.samples_lost
            self._write(last)
        last |= speed
        self._scalars("train", last)
        self._flush_file()
        return last

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
            for key in record.keys() - {"step", "rows_checksum", "seconds", "masked"}:
                self._board.add_scalar(f"{group}/{key}", record[key], record["step"])

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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a line that a killed process left unfinished is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _drop_after(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    temporary.replace(path)


class Stopwatch:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
