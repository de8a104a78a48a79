"""Saving: all ranks write their part at once, and rank 0 lets the folder appear when all of them have.

In the background (`checkpoint.async`) a save holds the training up only while values are copied to a buffer of the
host's memory. A thread on each rank writes them; these threads meet in a process group of their own, so they never
mix with the collectives of a step. A checkpoint counts from the rename on, wherever the training is by then.
"""

import json
import math
import queue
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoint.folder import BEING_WRITTEN, hidden_name, prune_checkpoints
from pretrain.checkpoint.format import (
    FORMAT,
    INDEX_FILE,
    LOGITS_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    CheckpointManifest,
    FileEntry,
    Index,
    TrainingState,
    checkpoint_name,
)
from pretrain.checkpoint.logits import EMBEDDING, POSITIONS, SavedLogits, caught_output, fixed_batch
from pretrain.checkpoint.writing import publish, write_bytes, write_tensors
from pretrain.config.training import CheckpointConfig
from pretrain.files import fsync_path
from pretrain.model.layout import AttentionLayout
from pretrain.training.zero.engine import Engine


def engine_logits(engine: Engine) -> SavedLogits:
    """What the model under training computes now; collective, because under ZeRO no rank has all weights."""
    vocab_size = engine.parameter_shapes[EMBEDDING][0]
    input_ids = (torch.arange(POSITIONS) * 7919 % vocab_size)[None]
    encoder = engine.module.encoder
    engine.eval()
    with torch.no_grad(), caught_output(engine.module.head) as caught:
        batch = fixed_batch(input_ids)
        engine.forward(batch.to(engine.device), AttentionLayout.from_batch(batch).to(engine.device))
    engine.train()
    return SavedLogits(input_ids, caught[0], engine.arithmetic, encoder.rotary_theta, encoder.positions_dropped)


SPARE_BYTES = 64 * 2**20
"""What a save leaves free on the disk, for metrics and logs."""
MEETING_TIMEOUT = timedelta(hours=2)
"""How long the ranks that have written wait for the slowest one."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class SaveResult:
    """How a save ended, the same on every rank."""

    name: str
    """Name of the checkpoint's folder."""
    seconds: float
    """Seconds from the call to its end."""
    error: str | None = None
    """Why there is no new checkpoint; those before are as they were."""
    note: str | None = None
    """What went wrong beside a checkpoint that is saved."""


@dataclass
class RankFile:
    """What one rank has written, and what went wrong."""

    streams: dict[int, list[Any]]
    entries: list[tuple[str, str, int, int]]
    file: tuple[str, FileEntry] | None = None
    failure: Exception | None = None


class CheckpointSaver:
    """Saves a run's checkpoints, one at a time, and removes old ones.

    `save` and `wait` are for all ranks alike; `finished` never waits.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        config: CheckpointConfig,
        own_streams: Collection[int],
        fence: Callable[[], None] = lambda: None,
        damaged: Collection[str] = (),
    ) -> None:
        """Collective.

        Args:
            folder: the run's `checkpoints/`.
            engine: whose weights and moments are saved.
            config: when to save in the background, and what to keep.
            own_streams: the streams that this rank reads.
            fence: called by rank 0 right before a checkpoint appears. If it raises, none does, and every rank raises
                the same.
            damaged: names of checkpoints that are damaged: never removed, and not counted among those to keep.
        """
        self._folder, self._engine, self._config = folder, engine, config
        self._own_streams, self._fence, self._damaged = list(own_streams), fence, set(damaged)
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=MEETING_TIMEOUT)
        self._thread: threading.Thread | None = None
        self._results: queue.SimpleQueue[SaveResult | Exception] = queue.SimpleQueue()
        self._saved: str | None = None
        self._buffer: Tensor | None = None
        if config.background and engine.files is None:
            numel = sum(fragment.tensor.numel() for fragment in engine.partition.own(engine.partition.fragments()))
            # Written to once, so that the first save does not wait for the kernel to find the memory.
            self._buffer = torch.empty(numel, pin_memory=engine.device.type == "cuda").zero_()

    def save(self, state: TrainingState, *, at_once: bool = False) -> None:
        """Save, after the save before has ended; collective. Nothing is done if this very step is saved already.

        Args:
            state: of this rank; its stream state is taken for its own streams and gathered for the others.
            at_once: return only when it is done, although saves are made in the background otherwise.

        Raises:
            OSError: the disk of `training.offload_folder` has lost values; nothing is saved.
        """
        self.wait()
        if self._saved == checkpoint_name(state.step):
            return
        began = time.monotonic()
        if self._engine.files is not None:
            self._engine.files.flush()
        self._engine.set_tokens_seen(state.tokens_seen)
        logits = engine_logits(self._engine)
        partition = self._engine.partition
        pieces = list(partition.own(partition.fragments()))
        values = [piece.tensor for piece in pieces]
        in_background = self._buffer is not None and not at_once
        if in_background:
            values = self._copied(values)
        entries = [(piece.kind, piece.parameter, piece.start, piece.tensor.numel()) for piece in pieces]
        own = RankFile(state.stream.of_streams(self._own_streams), entries)
        work = partial(self._work, began, state, logits, own, values)
        if in_background:
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            work()

    def wait(self) -> None:
        """Return when no save is under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finished(self) -> Iterator[SaveResult]:
        """The saves that have ended since the last call.

        Raises:
            Exception: what the fence raised, or what no save expects.
        """
        while not self._results.empty():
            result = self._results.get()
            if isinstance(result, Exception):
                raise result
            yield result

    def _copied(self, values: list[Tensor]) -> list[Tensor]:
        """The values as they are now, in the buffer."""
        assert self._buffer is not None
        copies = self._buffer.split([value.numel() for value in values])
        for copy, value in zip(copies, values, strict=True):
            copy.copy_(value, non_blocking=True)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()
        return list(copies)

    # ------------------------------------------------------------------------------------- perhaps on the thread

    def _work(
        self, began: float, state: TrainingState, logits: SavedLogits, own: RankFile, values: list[Tensor]
    ) -> None:
        """Write, meet the other ranks, commit; the result goes to `finished`."""
        name, note = checkpoint_name(state.step), None
        try:
            hidden, failure = self._broadcast(self._prepare(name) if self._rank == 0 else ("", None))
            if failure is None:
                self._write_own(self._folder / hidden, own, values)
                files = self._gather(own)
                failure = next((other.failure for other in files if other.failure), None)
                if self._rank == 0:
                    failure, note = self._finish(self._folder / hidden, state, logits, files, failure)
                failure, note = self._broadcast((failure, note))
        except Exception as error:  # noqa: BLE001 (the training must hear of it, whatever it is)
            failure = error
        seconds = time.monotonic() - began
        if failure is None:
            self._saved = name
            self._results.put(SaveResult(name, seconds, note=note))
        elif isinstance(failure, OSError):
            self._results.put(SaveResult(name, seconds, error=str(failure)))
        else:
            self._results.put(failure)

    def _prepare(self, name: str) -> tuple[str, Exception | None]:
        """Rank 0: make the hidden folder; fail before the disk is full, since what else writes to it would fail too."""
        hidden = hidden_name(name, BEING_WRITTEN)
        moments = self._engine.moments
        needed = 4 * sum((1 + len(moments[n])) * math.prod(s) for n, s in self._engine.parameter_shapes.items())
        try:
            (self._folder / hidden).mkdir(parents=True, mode=0o700)
            free = shutil.disk_usage(self._folder).free
            if free < needed + min(SPARE_BYTES, needed):
                raise OSError(f"{needed / 1e6:,.0f} MB to write, but {free / 1e6:,.0f} MB free in {self._folder}")
        except OSError as failure:
            shutil.rmtree(self._folder / hidden, ignore_errors=True)
            return hidden, failure
        return hidden, None

    def _write_own(self, temporary: Path, own: RankFile, values: list[Tensor]) -> None:
        """Write this rank's file; what goes wrong is noted, since the other ranks wait."""
        name = f"rank-{self._rank:05d}.safetensors"
        keys = [f"{kind}/{parameter}/{start}" for kind, parameter, start, _ in own.entries]
        try:
            temporary.mkdir(parents=True, exist_ok=True, mode=0o700)
            own.file = name, write_tensors(temporary / name, dict(zip(keys, values, strict=True)))
        except Exception as failure:  # noqa: BLE001
            own.failure = failure

    def _finish(
        self,
        temporary: Path,
        state: TrainingState,
        logits: SavedLogits,
        rank_files: list[RankFile],
        failure: Exception | None,
    ) -> tuple[Exception | None, str | None]:
        """Rank 0: commit what all have written, or clear it away. Returns what failed, and what else went wrong."""
        try:
            if failure is None:
                self._commit(temporary, state, logits, rank_files)
        except Exception as error:  # noqa: BLE001
            failure = error
        if failure is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            return failure, None
        self._damaged.discard(checkpoint_name(state.step))
        try:
            prune_checkpoints(self._folder, self._config.keep_last, self._config.keep_every, self._damaged)
        except OSError as error:
            return None, f"an old checkpoint could not be removed: {error}"
        return None, None

    def _commit(self, temporary: Path, state: TrainingState, logits: SavedLogits, rank_files: list[RankFile]) -> None:
        """Write what all ranks share, then let the folder appear under its name."""
        files, fragments = {}, {}
        for written in rank_files:
            assert written.file is not None
            name, files[written.file[0]] = written.file
            fragments[name] = written.entries
        shapes = {name: list(shape) for name, shape in self._engine.parameter_shapes.items()}
        index = Index(format=FORMAT, shapes=shapes, fragments=fragments)
        stream = state.stream.merged(written.streams for written in rank_files)
        training_state = json.dumps(replace(state, stream=stream).to_json(), indent=1)
        files[LOGITS_FILE] = write_tensors(temporary / LOGITS_FILE, logits.tensors, logits.metadata)
        files[INDEX_FILE] = write_bytes(temporary / INDEX_FILE, [index.model_dump_json().encode()])
        files[STATE_FILE] = write_bytes(temporary / STATE_FILE, [training_state.encode()])
        manifest = CheckpointManifest(format=FORMAT, step=state.step, files=files)
        write_bytes(temporary / MANIFEST_FILE, [manifest.sealed()])
        fsync_path(temporary)
        self._fence()
        publish(temporary, self._folder / checkpoint_name(state.step))

    def _broadcast(self, value: Value) -> Value:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        return box[0]

    def _gather(self, value: Value) -> list[Value]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self._world_size
        dist.all_gather_object(values, value, group=self._group)
        return values
