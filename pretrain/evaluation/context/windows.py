"""Target blocks and the nested windows around them: the same masked tokens, seen from windows of every length.

A block is as long as a row of the training. It lies at a random place of a document that is long enough for the longest
window; the windows around it are nested and masked alike. Windows shorter than a block tile it, so that at every length
exactly the masked tokens of the block are scored. No model in here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.batch import IGNORED
from pretrain.config.run import RunConfig
from pretrain.data.counter_random import Namespace, bits, permutation, uniform
from pretrain.data.manifest import Manifest
from pretrain.data.shards.access import ShardAccess
from pretrain.data.stream.masking import MaskingRule, mask_rows
from pretrain.data.tokenizer import BOS, EOS, MASK
from pretrain.errors import UserError

TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """A target block inside its longest window."""

    document: int
    """Number of the document among those of the split that are at least a row long."""
    document_length: int
    """Tokens of the document, begin and end symbols included."""
    ids: TokenIds
    """int64 [longest], before masking."""
    key: int
    """Decides the masks."""
    offset: int
    """First position of the block in `ids`."""


@dataclass(frozen=True)
class WindowRows:
    """What the model is given for some windows at one length."""

    inputs: TokenIds
    """int64 [rows, length], masked."""
    targets: TokenIds
    """int64 [rows, length]: the id to predict at the masked positions of the blocks, IGNORED elsewhere."""

    @property
    def positions(self) -> TokenIds:
        """Column of every target, in the order of the losses."""
        return np.nonzero(self.targets != IGNORED)[1]


def window_length(multiple: float, training_length: int) -> int:
    """Positions of a window of `multiple` training lengths.

    Raises:
        UserError: it is not a whole number of positions, or shorter than a block and no whole part of it.
    """
    length = round(multiple * training_length)
    if length < 1 or abs(length - multiple * training_length) > 1e-6:
        raise UserError(f"a window of {multiple:g}x is not a whole number of tokens at length {training_length}")
    if length < training_length and training_length % length:
        raise UserError(
            f"windows of {multiple:g}x do not tile a row of {training_length}; below 1x use a half, a quarter, ..."
        )
    return length


def long_documents(config: RunConfig, manifest: Manifest) -> list[TokenIds]:
    """The documents of the evaluation's split that are at least a row long, with begin and end symbols."""
    documents = []
    access = ShardAccess.of_run(config, manifest)
    for entry in manifest.splits[config.evaluation.split].shards:
        shard = access.open(config.corpus.path, entry, manifest.token_dtype)
        for sample in np.flatnonzero(shard.lengths + 2 >= config.data.sequence_length):
            ids = shard.tokens(int(sample), 0, int(shard.lengths[sample])).astype(np.int64)
            documents.append(np.concatenate(([BOS], ids, [EOS])))
    return documents


def draw_windows(documents: Sequence[TokenIds], block: int, longest: int, count: int, seed: int) -> list[Window]:
    """Draw target blocks at random among all there are, each at a random place in its longest window.

    Args:
        documents: of `long_documents`.
        block: positions of a block.
        longest: positions of the longest window, at least `block`.
        count: how many blocks at most. Fewer are the first of more: results of the first ones stay what they are.
        seed: decides all of it.
    """
    blocks = [
        (number, start)
        for number, ids in enumerate(documents)
        if len(ids) >= longest
        for start in range(0, len(ids) - block + 1, block)
    ]
    windows = []
    for key in permutation(len(blocks), seed, Namespace.CONTEXT_BLOCKS)[:count].tolist():
        number, start = blocks[key]
        ids = documents[number]
        lowest, highest = max(0, start + block - longest), min(start, len(ids) - longest)
        begin = lowest + int(uniform(seed, Namespace.CONTEXT_OFFSETS, key)[0] * (highest - lowest + 1))
        windows.append(Window(number, len(ids), ids[begin : begin + longest], key, start - begin))
    return windows


def make_rows(windows: Sequence[Window], length: int, block: int, rule: MaskingRule, seed: int) -> WindowRows:
    """The rows of `length` positions for some windows; row-major, their targets are in the same order at any length."""
    offsets = np.array([window.offset for window in windows])
    longest = len(windows[0].ids)
    keys = bits(seed, Namespace.CONTEXT_MASKS, np.array([window.key for window in windows]))
    inputs, labels = mask_rows(np.stack([window.ids for window in windows]), keys, rule)
    if length < block:
        columns = (offsets[:, None] + np.arange(block)).reshape(len(windows), -1)
    else:
        columns = _nested_starts(offsets, length, block, longest)[:, None] + np.arange(length)
    in_block = (columns >= offsets[:, None]) & (columns < offsets[:, None] + block)
    targets = np.where(in_block, np.take_along_axis(labels, columns, 1), IGNORED)
    seen = np.take_along_axis(inputs, columns, 1)
    return WindowRows(seen.reshape(-1, length), targets.reshape(-1, length))


def _nested_starts(offsets: TokenIds, length: int, block: int, longest: int) -> TokenIds:
    """Return where windows of `length` begin in the longest ones.

    The block keeps its relative place in the room around it.
    """
    share = (length - block) / max(longest - block, 1)
    return offsets - np.round(offsets * share).astype(np.int64)


def single_mask_rows(windows: Sequence[Window], length: int, block: int, rule: MaskingRule, seed: int) -> WindowRows:
    """Return the rows of `make_rows`, of at least a block, in which only the middle target of each window is masked."""
    rows = make_rows(windows, length, block, rule, seed)
    offsets = np.array([window.offset for window in windows])
    columns = _nested_starts(offsets, length, block, len(windows[0].ids))[:, None] + np.arange(length)
    inputs = np.take_along_axis(np.stack([window.ids for window in windows]), columns, 1)
    kept = middle_targets(rows)
    targets = np.where(kept, rows.targets, IGNORED)
    return WindowRows(np.where(kept, MASK, inputs), targets)


def middle_targets(rows: WindowRows) -> npt.NDArray[np.bool_]:
    """bool [rows, length]: the middle one of each row's targets."""
    is_target = rows.targets != IGNORED
    number = is_target.cumsum(axis=1)
    return is_target & (number == (number[:, -1:] + 1) // 2)
