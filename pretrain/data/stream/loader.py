"""Rows -> batches: what one rank puts through the model in each step, with the state to resume after it.

The order of rows and their masks are decided elsewhere; here are blocks of steps and the processes that make them.
"""

import atexit
import multiprocessing
import multiprocessing.queues
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, repeat

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pretrain.batch import IGNORED, Batch
from pretrain.config.parallel import DataRank
from pretrain.config.run import RunConfig
from pretrain.data.arrays import Floats
from pretrain.data.counter_random import Namespace, bits
from pretrain.data.manifest import TOKENIZER, Manifest
from pretrain.data.shards.access import ShardAccess
from pretrain.data.stream.masking import MaskingRule, mask_in_place, rate_at
from pretrain.data.stream.packing import PackingRule
from pretrain.data.stream.reader import RowSource, StreamReader, Taken
from pretrain.data.stream.rows import STRIP_POSITIONS, UnmaskedRows
from pretrain.data.stream.state import ORDER, StreamState
from pretrain.data.tokenizer import PAD, Tokenizer
from pretrain.errors import UserError

_BLOCK_POSITIONS = 2**18
"""Positions that a rank makes at a time: arrays are long enough for numpy, and short enough to stay near the core."""


@dataclass(frozen=True)
class StepRows:
    """Rows of one rank in one optimizer step, and where the stream stands after them."""

    batch: Batch
    state: StreamState

    def pin_memory(self) -> "StepRows":
        """Return the same in page-locked memory; torch's loader calls it where there is a GPU."""
        return StepRows(self.batch.pin_memory(), self.state)


def masking_rule(config: RunConfig) -> MaskingRule:
    """Return how the run corrupts rows, over the corpus' vocabulary."""
    tokenizer = Tokenizer(config.corpus.path / TOKENIZER)
    return MaskingRule.from_tokenizer(tokenizer, config.data)


def packing_rule(config: RunConfig, manifest: Manifest) -> PackingRule:
    """Return how the run puts documents into rows.

    Raises:
        UserError: a weight for a source that the corpus does not have.
    """
    data, names = config.data, [source.name for source in manifest.sources]
    if unknown := data.source_weights.keys() - set(names):
        raise UserError(
            f"source_weights names {', '.join(sorted(unknown))}, but the sources of {config.corpus.path} are "
            f"{', '.join(names)}"
        )
    weights = tuple(data.source_weights.get(name, 1.0) for name in names) if data.source_weights else ()
    return PackingRule(data.sequence_length, data.packing, data.cut, weights)


def read_batch(
    reader: StreamReader,
    taken: Taken,
    shape: tuple[int, int],
    rule: MaskingRule,
    key: tuple[int, Namespace],
    rates: Floats,
) -> Batch:
    """Read rows that were taken and mask them; rows of padding come after them, up to `shape`.

    A row's mask depends on seed and namespace (`key`), its global number and its rate alone. `rates` is
    float64 [rows taken].
    """
    # In one piece, which the system gives in large pages where it is as long as a block.
    input_ids, labels, document_ids, position_ids = fields = np.empty((4, *shape), dtype=np.int64)
    rows = len(taken.numbers)
    fields[:, rows:] = PAD
    labels[rows:] = IGNORED
    if rows:
        reader.read(taken, UnmaskedRows(input_ids[:rows], document_ids[:rows], position_ids[:rows]))
    row_keys = bits(*key, taken.numbers)
    strip = max(1, 2 * STRIP_POSITIONS // shape[1])
    for first in range(0, rows, strip):
        at = slice(first, min(first + strip, rows))
        mask_in_place(input_ids[at], labels[at], row_keys[at], rule, rates[at])
    return Batch(*map(torch.from_numpy, fields))


class _TrainingSteps(IterableDataset[StepRows | UserError]):
    """Endless steps of one rank. Worker w of n makes the steps w, w + n, ... and only counts the rows between.

    An error that is an answer is the last thing that a worker gives: torch would raise it with a traceback in it.
    """

    def __init__(
        self, config: RunConfig, source: RowSource, rule: MaskingRule, state: StreamState, data_rank: DataRank
    ) -> None:
        self._config, self._source, self._rule, self._state = config, source, rule, state
        self._data_rank = data_rank

    def __iter__(self) -> Iterator[StepRows | UserError]:
        info = get_worker_info()
        try:
            yield from self._steps(*((info.id, info.num_workers) if info else (0, 1)))
        except UserError as error:
            yield error

    def _steps(self, worker: int, num_workers: int) -> Iterator[StepRows]:
        reader = StreamReader(self._source, self._state, self._data_rank)
        training, length = self._config.training, self._config.data.sequence_length
        most = max(1, _BLOCK_POSITIONS * self._data_rank.count // (training.batch_size * length))
        # Blocks grow: the first step is soon there, and few steps, as a test or a short resume wants, cost little.
        for steps in chain((2**n for n in range(most.bit_length() - 1)), repeat(most)):
            yield from self._block(reader, steps, worker, num_workers)

    def _block(self, reader: StreamReader, steps: int, worker: int, num_workers: int) -> list[StepRows]:
        """Make the next steps of this worker together."""
        data, training = self._config.data, self._config.training
        step_positions = training.batch_size * data.sequence_length
        taken, states = reader.take_steps(training.batch_size, steps * num_workers)
        states = states[worker::num_workers]
        rates = [
            rate_at(state.positions - step_positions, training.tokens, data.mask_rate, data.final_mask_rate)
            for state in states
        ]
        rows = len(taken.numbers) // (steps * num_workers)
        taken = taken[np.arange(len(taken.numbers)) // rows % num_workers == worker]
        shape, of_rows = (rows * steps, data.sequence_length), np.repeat(rates, rows)
        block = read_batch(reader, taken, shape, self._rule, (self._config.seed, Namespace.TRAIN_MASKS), of_rows)
        return [StepRows(*pair) for pair in zip(block.split(rows), states, strict=True)]


def _begin_worker(_: int) -> None:
    """Keep a worker alive as long as its rank: a signal to all processes must not end it before the rank has saved.

    What a worker cannot hand over, Python would print and drop, and the rank would wait for it for ever.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


@atexit.register
def _kill_workers() -> None:
    """End workers with their rank: Python asks them by SIGTERM, which they ignore, and waits."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _end_worker(error: Exception, _: object) -> None:
    print(f"a loader worker cannot hand its rows over: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def _shared_memory() -> str:
    """Say how much there is, and what to do about it."""
    try:
        disk = shutil.disk_usage("/dev/shm")
    except OSError:
        return "use data.workers=0"
    return (
        f"/dev/shm, through which workers hand their rows over, holds {disk.total / 1e6:,.1f} MB, of which "
        f"{disk.free / 1e6:,.1f} are free now; give the container more "
        "(--shm-size, --ipc=host), or use fewer data.workers; 0 needs none"
    )


def _explained(steps: Iterator[StepRows | UserError]) -> Iterator[StepRows | UserError]:
    """Yield the same steps; a worker that died is answered."""
    try:
        yield from steps
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            f"{str(error).splitlines()[0].rstrip('.')}. This log may say why. {_shared_memory()}"
        ) from error


def training_steps(
    config: RunConfig, manifest: Manifest, state: StreamState, data_rank: DataRank
) -> Iterator[StepRows]:
    """Yield the rank's steps after `state`, without end, in the phase that `state` is in.

    Rows and masks are the same for any number of ranks and workers.

    Raises:
        UserError: the corpus has fewer training shards than the run has streams; `state` is of a version of Diptych
            that makes another order, so that rows would be lost and repeated; or no worker can be started.
        RuntimeError: a worker ended.
    """
    if state.order != ORDER:
        raise UserError(
            f"the run's rows are in order {state.order}, and this version of Diptych makes order {ORDER}; finish it "
            "with the version that began it, or begin a new run"
        )
    phase = state.rows.shape[1] - 1
    rules = [packing_rule(config.in_phase(number), manifest) for number in range(phase + 1)]
    config = config.in_phase(phase)
    source = RowSource(config.corpus.path, manifest, "train", config.seed, rules, ShardAccess.of_run(config, manifest))
    if source.num_shards < config.data.streams:
        raise UserError(
            f"the corpus at {config.corpus.path} is too small for its streams: {source.num_shards} training shards for "
            f"data.streams = {config.data.streams}; use data.streams={source.num_shards} or fewer, or build it with a "
            f"larger corpus.min_train_shards"
        )
    dataset = _TrainingSteps(config, source, masking_rule(config), state, data_rank)
    workers = config.data.workers
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_begin_worker if workers else None,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        steps = iter(loader)  # the workers begin at once
    except OSError as error:
        raise UserError(f"loader workers cannot be started: {error}. {_shared_memory()}") from error
    return _in_one_order(_explained(steps), state)


def _in_one_order(steps: Iterator[StepRows | UserError], state: StreamState) -> Iterator[StepRows]:
    """Yield the same steps, after a look whether all workers went the same way.

    Raises:
        UserError: one passed over a damaged shard that another could read, so that their rows are not of one order; or
            what a worker ended with.
    """
    for step in steps:
        if isinstance(step, UserError):
            raise type(step)(*step.args)  # not itself: this frame would keep it, it this frame, and both the workers
        if step.state.is_behind(state):
            raise UserError(
                "a shard was damaged for one loader worker and whole for another, so it was changed while the run read "
                "it; see that nothing writes to the corpus, and run the same command again: it resumes"
            )
        state = step.state
        yield step


def validation_batches(
    config: RunConfig,
    manifest: Manifest,
    data_rank: DataRank,
    rows_per_batch: int,
    on_any_rank: Callable[[bool], bool] = bool,
) -> Iterator[Batch]:
    """Yield the rank's share of the first `training.validation_rows` rows of the validation split, always the same.

    Every rank gives equally many batches, so that they can be evaluated together under any sharding; where the rows
    do not suffice, a row of padding stands in. All ranks open all shards, so what is damaged on one node only is left
    out by all: `on_any_rank` says of a value of this rank whether it is true on any.
    """
    rule_of_rows = replace(packing_rule(config, manifest), source_weights=())
    source = RowSource(
        config.corpus.path, manifest, "valid", config.seed, [rule_of_rows], ShardAccess.of_run(config, manifest)
    )
    rule = masking_rule(config)
    sizes = [len(opened[1]) if (opened := source.try_open(v)) else None for v in range(source.num_shards)]
    source.left_out = frozenset(v for v, size in enumerate(sizes) if on_any_rank(size is None))
    rows_in_epoch = sum(size for v, size in enumerate(sizes) if size and v not in source.left_out)
    total = min(config.training.validation_rows, rows_in_epoch)
    reader = StreamReader(source, StreamState.start(1))
    share = -(-total // data_rank.count)
    for start in range(0, share, rows_per_batch):
        wanted = min(rows_per_batch, share - start)
        taken = reader.take(min(wanted * data_rank.count, total - reader.state.position))
        taken = taken[taken.numbers % data_rank.count == data_rank.index]
        rates = np.full(len(taken.numbers), rule.rate)
        shape = wanted, config.data.sequence_length
        yield read_batch(reader, taken, shape, rule, (config.seed, Namespace.VALID_MASKS), rates)
