"""Random numbers as pure functions of integers, so that nothing about them has to be saved.

A value is the splitmix64 finalizer (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014;
constants of Stafford's variant 13) folded over its arguments. Unlike the generators of a library, it is the same in
every version of everything, for any order of evaluation.

A run's keys begin with its seed and a `Namespace`.
"""

from enum import IntEnum
from itertools import takewhile

import numpy as np

from pretrain.data.arrays import AnyInts, Floats, Ints, UInt64

_GOLDEN = 0x9E3779B97F4A7C15
_ALL = 2**64 - 1


class Namespace(IntEnum):
    """Number in a key after the seed, so that random choices of different kinds are independent.

    No number may change: rows, masks and targets of every run depend on them. The two that are 10 cannot meet, for
    their keys are of different lengths: each value of `SOURCE_REPEATS` mixes a number more into the state that
    `TASK_CANDIDATES` would take as it is.
    """

    SHARD_ORDER = 1
    """seed, this, epoch, place: the order of the shards in an epoch."""
    ROW_PLAN = 2
    """seed, this, visit, phase, `PlanChoice`, place: which pieces stand together, and in which order."""
    TRAIN_MASKS = 3
    """seed, this, row: the key of a row's mask, which `masking.mask_in_place` makes longer."""
    VALID_MASKS = 4
    """seed, this, row: the same for rows of a run's validation."""
    CONTEXT_BLOCKS = 6
    """seed, this, place: which target blocks the context report draws."""
    CONTEXT_OFFSETS = 7
    """seed, this, block: where a block lies in its longest window."""
    CONTEXT_MASKS = 8
    """seed, this, block: the key of the mask of a block's longest window."""
    SOURCE_REPEATS = 10
    """seed, this, shard, document: from which epochs on a weighted source's document is read once more."""
    TASK_CANDIDATES = 10
    """seed, this, place: the pieces that keys of the retrieval tasks are made of."""
    TASK_FILLER = 11
    """seed, this, task, length, row, column: what surrounds the pairs."""
    TASK_PAIR = 12
    """seed, this, task, length, row, half, place: the tokens of a pair."""
    TASK_DISTRACTORS = 13
    """seed, this, length, row, place: where other pairs stand; with more numbers, their tokens."""


class PlanChoice(IntEnum):
    """Number in a `Namespace.ROW_PLAN` key after the phase."""

    ROW_ORDER = 0
    """Order of the rows of a visit."""
    ORDER_IN_ROW = 1
    """Order of the pieces in a row."""
    WHICH_PIECE = 2
    """Which of the pieces of one length goes where."""
    DOCUMENT_ORDER = 3
    """Order in which documents are written one after another."""


def _finalize(z: UInt64) -> None:
    """Mix every element, in place: `z` is only this module's, and large."""
    shifted = z >> np.uint64(30)
    z ^= shifted
    z *= np.uint64(0xBF58476D1CE4E5B9)
    np.right_shift(z, np.uint64(27), out=shifted)
    z ^= shifted
    z *= np.uint64(0x94D049BB133111EB)
    np.right_shift(z, np.uint64(31), out=shifted)
    z ^= shifted


def bits(*key: int | AnyInts) -> UInt64:
    """Return a uniform uint64 for each element of the broadcast `key`."""
    state, numbers = 0, [int(number) for number in takewhile(lambda number: isinstance(number, int), key)]
    for number in numbers:
        state = _mixed(state ^ (number & _ALL))
    return more_bits(np.array([state], dtype=np.uint64), *key[len(numbers) :])


def _mixed(value: int) -> int:
    """Return what `more_bits` makes of one number; for one, Python is faster than numpy."""
    z = value + _GOLDEN & _ALL
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _ALL
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _ALL
    return z ^ z >> 31


def more_bits(value: UInt64, *key: int | AnyInts) -> UInt64:
    """Return the bits of a longer key from those of its beginning: what many keys begin with is mixed once."""
    with np.errstate(over="ignore"):
        for number in key:
            value = value ^ np.asarray(number).astype(np.uint64)
            value += np.uint64(_GOLDEN)
            _finalize(value)
    return value


def uniform(*key: int | AnyInts) -> Floats:
    """Return a uniform float64 in [0, 1) for each element of the broadcast `key`."""
    return (bits(*key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(n: int, *key: int) -> Ints:
    """Return a permutation of 0..n-1, int64 [n]."""
    return order_within(np.zeros(n, dtype=np.int64), *key)


def order_within(groups: AnyInts, *key: int) -> Ints:
    """Return the places 0..n-1, by rising `groups` (at least 0), those of one group in a random order; int64 [n].

    Group, random bits and place are sorted as one number each: that is several times faster than sorting places by
    keys, and no two are equal, so that every way to sort gives the same.
    """
    n = len(groups)
    if not n:
        return np.zeros(0, dtype=np.int64)
    of_place, of_group = (n - 1).bit_length(), int(groups.max()).bit_length()
    assert of_place + of_group < 64, "there are fewer than 2**32 places, and so fewer groups"
    places = np.arange(n)
    keys = bits(*key, places)
    keys >>= np.uint64(of_place + of_group)
    keys <<= np.uint64(of_place)
    keys |= groups.astype(np.uint64) << np.uint64(64 - of_group) if of_group else np.uint64(0)
    keys |= places.astype(np.uint64)
    keys.sort()
    keys &= np.uint64((1 << of_place) - 1)
    return keys.astype(np.int64)
