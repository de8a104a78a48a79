"""Tasks that need no data: find a key, or the rest of a repeated passage, at every distance, depth and side.

A row is random tokens, drawn by how often they occur in the training split, with a pair somewhere in it:

    passkey   ... [marker key] ... [marker MASK MASK MASK MASK] ...
    multikey  the same among other pairs of a marker and a key
    copy      ... [passage] ... [passage with two tokens masked] ...

The answer may stand before the question or after it, since the encoder sees both sides. What is masked is one of a few
pieces, and the most likely among these is the encoder's answer: guessing is right once in `num_candidates`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.batch import IGNORED
from pretrain.data.counter_random import Namespace, bits, permutation, uniform
from pretrain.data.tokenizer import BOS, EOS, MASK
from pretrain.evaluation.context.windows import TokenIds

SPAN = 8
"""Tokens of each half of a pair."""

KEY = 4
"""Tokens of the key among them; the rest is its marker."""

DEPTHS = (0.0, 0.5, 1.0)

SIDES: tuple[Literal["past", "future"], ...] = ("past", "future")

CANDIDATES = 10

DISTRACTORS = 3
"""Other pairs in `multikey`."""

_TASK_NUMBER = {"passkey": 0, "multikey": 1, "copy": 2}
"""Part of a key after the namespace."""


@dataclass(frozen=True)
class Vocabulary:
    """What rows are made of."""

    pieces: TokenIds
    """Pieces that occur in the training split, the most frequent first."""
    cumulative: npt.NDArray[np.float64]
    """Cumulative shares of the pieces in the training split."""
    candidates: TokenIds
    """What keys are made of."""

    @classmethod
    def from_counts(cls, counts: npt.NDArray[np.int64], is_special: npt.NDArray[np.bool_], seed: int) -> "Vocabulary":
        """Make one of the training split's token counts; candidates are drawn among the more frequent half."""
        order = np.argsort(-np.where(is_special, -1, counts), kind="stable")
        pieces = order[: max(CANDIDATES, int(((counts > 0) & ~is_special).sum()))]
        frequent = pieces[: max(CANDIDATES, len(pieces) // 2)]
        chosen = frequent[permutation(len(frequent), seed, Namespace.TASK_CANDIDATES)[:CANDIDATES]]
        weights = counts[pieces].astype(np.float64) + 1
        return cls(pieces, np.cumsum(weights) / weights.sum(), np.sort(chosen))

    @property
    def chance(self) -> float:
        """Share that a guess among the candidates gets right."""
        return 1 / len(self.candidates)


@dataclass(frozen=True)
class TaskRows:
    """Rows of one task at one length, and the place of each."""

    inputs: TokenIds
    """int64 [rows, length]."""
    targets: TokenIds
    """int64 [rows, length]: the id to find, IGNORED elsewhere; equally many in every row."""
    distances: TokenIds
    """int64 [rows]."""
    depths: npt.NDArray[np.float64]
    sides: npt.NDArray[np.int64]
    """Index in SIDES."""


def distances_at(length: int, training_length: int) -> list[int]:
    """A quarter of the training length, doubled as long as there is room, and the farthest place there is."""
    farthest = length - 2 - SPAN
    distance = max(SPAN, training_length // 4)
    distances = []
    while distance <= farthest:
        distances.append(distance)
        distance *= 2
    last = farthest // SPAN * SPAN
    if last >= SPAN and last not in distances:
        distances.append(last)
    return distances


def num_rows(length: int, training_length: int, samples: int) -> int:
    """Rows of a task at a length."""
    return len(distances_at(length, training_length)) * len(DEPTHS) * len(SIDES) * samples


def draw_rows(
    task: str, length: int, training_length: int, samples: int, vocabulary: Vocabulary, seed: int
) -> TaskRows:
    """All rows of a task at a length, a pure function of its arguments; int64 everywhere."""
    places = [
        (distance, depth, side)
        for distance in distances_at(length, training_length)
        for depth in DEPTHS
        for side in range(len(SIDES))
        for _ in range(samples)
    ]
    rows, number = len(places), _TASK_NUMBER[task]
    random = uniform(seed, Namespace.TASK_FILLER, number, length, np.arange(rows)[:, None], np.arange(length)[None])
    inputs = vocabulary.pieces[
        np.searchsorted(vocabulary.cumulative, random, side="right").clip(max=len(vocabulary.pieces) - 1)
    ]
    inputs[:, 0], inputs[:, -1] = BOS, EOS
    targets = np.full_like(inputs, IGNORED)
    for row, (distance, depth, side) in enumerate(places):
        # Where the earlier half begins: after [BOS], and so that the later half ends before [EOS].
        room = length - 2 - distance - SPAN
        first = 1 + round(depth * room)
        answer, question = (first, first + distance) if SIDES[side] == "past" else (first + distance, first)
        pair, masked = _pair(task, (seed, Namespace.TASK_PAIR, number, length, row), vocabulary)
        if task == "multikey":
            _scatter_others(
                inputs[row], {first, first + distance}, (seed, Namespace.TASK_DISTRACTORS, length, row), vocabulary
            )
        inputs[row, answer : answer + SPAN] = pair
        inputs[row, question : question + SPAN] = np.where(masked, MASK, pair)
        targets[row, question : question + SPAN] = np.where(masked, pair, IGNORED)
    distances, depths, sides = (np.array(column) for column in zip(*places, strict=True))
    return TaskRows(inputs, targets, distances, depths, sides)


def _pair(task: str, key: tuple[int, ...], vocabulary: Vocabulary) -> tuple[TokenIds, npt.NDArray[np.bool_]]:
    """SPAN tokens, and which of them are asked for; those are candidates."""
    pieces = vocabulary.pieces[bits(*key, 0, np.arange(SPAN)) % np.uint64(len(vocabulary.pieces))]
    answers = vocabulary.candidates[bits(*key, 1, np.arange(SPAN)) % np.uint64(len(vocabulary.candidates))]
    masked = np.zeros(SPAN, dtype=np.bool_)
    if task == "copy":
        masked[[2, 5]] = True
    else:
        masked[-KEY:] = True
    return np.where(masked, answers, pieces), masked


def _scatter_others(row: TokenIds, taken: set[int], key: tuple[int, ...], vocabulary: Vocabulary) -> None:
    """Put other markers with other keys where there is room, beside the halves that begin at `taken`."""
    free = [
        start for start in range(1, len(row) - 1 - SPAN, SPAN) if all(abs(start - begin) >= SPAN for begin in taken)
    ]
    for number, place in enumerate(permutation(len(free), *key)[:DISTRACTORS].tolist()):
        row[free[place] : free[place] + SPAN], _ = _pair("multikey", (*key, number), vocabulary)
