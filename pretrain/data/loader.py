"""Rows -> the part of each optimizer step that one rank puts through the model, with the state to resume after it."""

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pretrain.batch import Batch
from pretrain.config import RunConfig
from pretrain.data.counter_random import bits
from pretrain.data.manifest import TOKENIZER, Manifest, Split
from pretrain.data.masking import MaskingRule, mask_rows, rate_at
from pretrain.data.packing import PackingRule
from pretrain.data.shard_access import ShardAccess
from pretrain.data.stream import Row, RowSource, StreamReader, StreamState
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import UserError

_MASKS = {"train": 3, "valid": 4, "test": 5}
"""First part of the key of a row's mask (1 and 2 are the stream's permutations)."""


@dataclass(frozen=True)
class StepRows:
    """One rank's rows of one optimizer step, and where the stream stands after them."""

    batch: Batch
    state: StreamState

    def pin_memory(self) -> "StepRows":
        """What the loader calls where there is a GPU."""
        return StepRows(self.batch.pin_memory(), self.state)


def masking_rule(config: RunConfig) -> MaskingRule:
    """The run's corruption of rows, over the corpus' vocabulary."""
    tokenizer = Tokenizer(config.corpus.path / TOKENIZER)
    return MaskingRule.from_tokenizer(tokenizer, config.data)


def packing_rule(config: RunConfig, manifest: Manifest) -> PackingRule:
    """How the run puts documents into rows.

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


def make_batch(rows: list[Row], numbers: list[int], rule: MaskingRule, seed: int, split: Split) -> Batch:
    """Mask rows and stack them; a row's mask depends on (seed, split, its global number) alone."""
    ids = np.stack([row.ids for row in rows])
    input_ids, labels = mask_rows(ids, bits(seed, _MASKS[split], np.array(numbers)), rule)
    fields = (input_ids, labels, *document_columns(rows, ids.shape[1]))
    return Batch(*(torch.from_numpy(np.ascontiguousarray(field)) for field in fields))


def document_columns(rows: list[Row], sequence_length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """`document_ids` and `position_ids` of a batch, each int64 [B, L]."""
    columns = np.arange(sequence_length)[None, :]
    begins = np.zeros((len(rows), sequence_length), dtype=np.int64)
    for begins_of_row, row in zip(begins, rows, strict=True):
        begins_of_row[row.begins] = 1
    inside = columns < np.array([row.length for row in rows])[:, None]
    positions = columns - np.maximum.accumulate(begins * columns, axis=1)
    return np.cumsum(begins, axis=1) * inside, positions * inside


class _TrainingSteps(IterableDataset[StepRows]):
    """Steps one after another. Worker w of n makes the steps w, w + n, ... and only counts the rows between."""

    def __init__(
        self, config: RunConfig, source: RowSource, rule: MaskingRule, state: StreamState, rank: int, world_size: int
    ) -> None:
        self._config, self._source, self._rule, self._state = config, source, rule, state
        self._rank, self._world_size = rank, world_size

    def __iter__(self) -> Iterator[StepRows]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        reader = StreamReader(self._source, self._state, self._rank, self._world_size)
        step = 0
        while True:
            mine = step % num_workers == worker
            positions = reader.state.positions
            taken = list(reader.rows(self._config.training.batch_size, read=mine))
            if mine:
                numbers, rows = [number for number, _ in taken], [row for _, row in taken if row is not None]
                data, total = self._config.data, self._config.training.tokens
                rule = replace(self._rule, rate=rate_at(positions, total, data.mask_rate, data.final_mask_rate))
                yield StepRows(make_batch(rows, numbers, rule, self._config.seed, "train"), reader.state)
            step += 1


def _ignore_signals(_: int) -> None:
    """Workers live as long as their rank; a signal to all processes must not end them before it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def training_steps(
    config: RunConfig, manifest: Manifest, state: StreamState, rank: int, world_size: int
) -> Iterator[StepRows]:
    """This rank's steps after `state`, without end; the same rows and masks for any number of ranks and workers.

    They are those of the phase that `state` is in.

    Raises:
        UserError: the corpus has fewer training shards than the run has streams.
    """
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
    dataset = _TrainingSteps(config, source, masking_rule(config), state, rank, world_size)
    workers = config.data.workers
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_ignore_signals if workers else None,
            prefetch_factor=4 if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
    )


def validation_batches(
    config: RunConfig, manifest: Manifest, rank: int, world_size: int, rows_per_batch: int
) -> Iterator[Batch]:
    """This rank's share of the first `training.validation_rows` rows of the validation split, always the same.

    Every rank gives equally many batches, so that they can be evaluated together under any sharding; where the rows
    do not suffice, a row of padding stands in.
    """
    rule_of_rows = replace(packing_rule(config, manifest), source_weights=())
    source = RowSource(
        config.corpus.path, manifest, "valid", config.seed, [rule_of_rows], ShardAccess.of_run(config, manifest)
    )
    rule = masking_rule(config)
    rows_in_epoch = sum(len(opened[1]) for v in range(source.num_shards) if (opened := source.try_open(v)))
    total = min(config.training.validation_rows, rows_in_epoch)
    reader = StreamReader(source, StreamState.start(1))
    taken = [
        (number, row)
        for number, row in reader.rows(total)
        if row is not None and number % world_size == rank % world_size
    ]
    share = -(-total // world_size)
    filler = Row(np.zeros(config.data.sequence_length, dtype=np.int64), [], 0)
    taken += [(0, filler)] * (share - len(taken))
    for start in range(0, share, rows_per_batch):
        numbers, rows = zip(*taken[start : start + rows_per_batch], strict=True)
        yield make_batch(list(rows), list(numbers), rule, config.seed, "valid")
