"""The masked-language-model corruption of rows, as a pure function of each row's key.

The recipe is BERT's (Devlin et al. 2019): of the tokens selected for prediction most become [MASK], some a random
piece, and the rest stay. Special symbols are neither selected nor drawn.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.batch import IGNORED
from pretrain.config.data import DataConfig
from pretrain.data.arrays import Flags, Floats, Ints, UInt64
from pretrain.data.counter_random import more_bits
from pretrain.data.tokenizer import MASK, Tokenizer
from pretrain.errors import UserError

_LOW = np.uint64(2**32 - 1)


@dataclass(frozen=True)
class MaskingRule:
    """How rows are corrupted."""

    rate: float
    """Probability that a token is to be predicted."""
    mask_token_share: float
    """Share of those that becomes [MASK]."""
    random_token_share: float
    """Share of those that becomes a random piece."""
    is_special: Flags
    """bool [vocab_size]: ids that are never selected nor drawn."""
    unit: Literal["token", "span", "whole_word"] = "token"
    """What is selected as one."""
    mean_span_length: float = 3.0
    """Tokens in a row that `span` selects, on average; at least 1 / (1 - rate)."""
    begins_word: Flags | None = None
    """bool [vocab_size], for `whole_word`: ids that begin a word."""
    ends_word: Flags | None = None
    """bool [vocab_size], for `whole_word`: ids after which a word begins: white space."""

    @cached_property
    def pieces(self) -> Ints:
        """Ids that may be drawn."""
        return np.flatnonzero(~self.is_special)

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, data: DataConfig) -> "MaskingRule":
        """Return the rule for a vocabulary.

        Raises:
            UserError: whole words are wanted, and the vocabulary has none.
        """
        is_special = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        is_special[list(tokenizer.special_ids)] = True
        of_words = word_boundaries(tokenizer) if data.mask_unit == "whole_word" else (None, None)
        if of_words[0] is not None and not of_words[0].any():
            raise UserError(
                "data.mask_unit = whole_word, but no piece of this corpus' vocabulary begins a word (proteins have "
                "none); use token or span"
            )
        return cls(
            rate=data.mask_rate,
            mask_token_share=data.mask_token_share,
            random_token_share=data.random_token_share,
            is_special=is_special,
            unit=data.mask_unit,
            mean_span_length=data.mean_span_length,
            begins_word=of_words[0],
            ends_word=of_words[1],
        )


def word_boundaries(tokenizer: Tokenizer) -> tuple[Flags, Flags]:
    """Return `begins_word` and `ends_word` of a vocabulary, each bool [vocab_size]."""
    pieces = [tokenizer.piece(i).replace("\u2581", " ") for i in range(tokenizer.vocab_size)]
    white = [not piece.strip() or piece in ("<0x09>", "<0x0A>", "<0x0D>", "<0x20>") for piece in pieces]
    begins = [piece[0].isspace() and not blank for piece, blank in zip(pieces, white, strict=True)]
    ends = [blank or piece[-1].isspace() for piece, blank in zip(pieces, white, strict=True)]
    return np.array(begins), np.array(ends)


def rate_at(positions: int, total: int, first: float, final: float | None) -> float:
    """Return the rate of a step before which `positions` of `total` were dealt: linear from `first` to `final`."""
    return first if final is None else first + (final - first) * min(positions / total, 1.0)


def mask_rows(ids: Ints, row_keys: UInt64, rule: MaskingRule, rates: Floats | None = None) -> tuple[Ints, Ints]:
    """Do as `mask_in_place` to a copy.

    Returns:
        input_ids int64 [B, L], and labels int64 [B, L] with IGNORED where nothing is predicted.
    """
    input_ids, labels = ids.copy(), np.empty_like(ids)
    mask_in_place(input_ids, labels, row_keys, rule, rates)
    return input_ids, labels


def mask_in_place(ids: Ints, labels: Ints, row_keys: UInt64, rule: MaskingRule, rates: Floats | None = None) -> None:
    """Corrupt rows.

    Args:
        ids: int64 [B, L], contiguous; padding is a special symbol and so stays.
        labels: int64 [B, L], contiguous, to be filled: IGNORED where nothing is predicted.
        row_keys: uint64 [B]; all randomness of a row comes from its key and the column.
        rule: rates and vocabulary.
        rates: float64 [B], where rows have rates of their own instead of the rule's.
    """
    length = ids.shape[1]
    # One mixing gives 64 bits, enough for two positions.
    pairs = more_bits(row_keys[:, None], 0, np.arange(-(-length // 2))).astype("<u8", copy=False)
    random = pairs.view("<u4")
    of_rows = np.array([rule.rate] if rates is None else rates)[:, None]
    chosen = np.flatnonzero(_selected(ids, random[:, :length], rule, of_rows))
    flat_ids, flat_labels = ids.reshape(-1), labels.reshape(-1)
    originals = flat_ids[chosen]
    is_text = ~rule.is_special[originals]
    chosen, originals = chosen[is_text], originals[is_text]
    # What is chosen depends on the upper half of a position's bits, as good as alone; the lower half is its fate.
    places = chosen if length % 2 == 0 else chosen + chosen // length
    fate = random.reshape(-1)[places].astype(np.uint16)
    random_from, random_to = np.rint(np.cumsum([rule.mask_token_share, rule.random_token_share]) * 2**16).astype(int)
    becomes_random = np.flatnonzero((fate >= random_from) & (fate < random_to))
    at = places[becomes_random]
    draws = more_bits(pairs.reshape(-1)[at // 2], 1 + at % 2) >> np.uint64(32)
    flat_labels[:] = IGNORED
    flat_labels[chosen] = originals
    np.copyto(originals, MASK, where=fate < random_from)
    originals[becomes_random] = rule.pieces[draws * np.uint64(len(rule.pieces)) >> np.uint64(32)]
    flat_ids[chosen] = originals


def _of_32_bits(share: npt.ArrayLike) -> UInt64:
    """Return the number that this share of all 32-bit numbers is below."""
    return np.rint(np.asarray(share) * 2.0**32).astype(np.uint64)


def _selected(ids: Ints, random: npt.NDArray[np.uint32], rule: MaskingRule, rates: Floats) -> Flags:
    """Select each position with its probability, bool [B, L], in the rule's units; units end at special symbols.

    Special symbols may be among them. `rates` is [B, 1] or [1, 1].
    """
    if rule.unit == "token":
        return random < np.minimum(_of_32_bits(rates), _LOW).astype(np.uint32)  # 64 bits would be slower
    columns, special = np.arange(ids.shape[1])[None, :], rule.is_special[ids]
    if rule.unit == "whole_word":
        assert rule.begins_word is not None
        assert rule.ends_word is not None
        begins = special | rule.begins_word[ids]
        begins[:, 1:] |= (special | rule.ends_word[ids])[:, :-1]
        begins[:, 0] = True
        first = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
        return np.take_along_axis(random, first, axis=1) < _of_32_bits(rates)
    # A chain of two states whose share of selected is `rate` and whose runs last `mean_span_length`: a small number
    # begins a run or goes on with it, a large one ends it, and one between leaves the state as it is. A special
    # symbol draws its state anew, so a run never leads from one document into the next.
    begin = _of_32_bits(rates / (rule.mean_span_length * (1 - rates)))
    end = _of_32_bits(1 - 1 / rule.mean_span_length)
    fresh = special | (columns == 0)
    decided = fresh | (random < begin) | (random >= end)
    state = np.where(fresh, random < _of_32_bits(rates), random < begin)
    return np.take_along_axis(state, np.maximum.accumulate(np.where(decided, columns, 0), axis=1), axis=1)
