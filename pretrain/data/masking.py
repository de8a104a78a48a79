"""The masked-language-model corruption of rows, as a pure function of each row's key.

The recipe is BERT's (Devlin et al. 2019): of the tokens selected for prediction most become [MASK], some a random
piece, and the rest stay. Special symbols are neither selected nor drawn.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.batch import IGNORED
from pretrain.config import DataConfig
from pretrain.data.counter_random import UInt64, bits, uniform
from pretrain.data.tokenizer import MASK, Tokenizer
from pretrain.errors import UserError

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MaskingRule:
    """How rows are corrupted."""

    rate: float
    """Probability that a token is to be predicted."""
    mask_token_share: float
    """Of those, the share that becomes [MASK]."""
    random_token_share: float
    """Of those, the share that becomes a random piece."""
    is_special: npt.NDArray[np.bool_]
    """bool [vocab_size]: ids that are never selected nor drawn."""
    unit: Literal["token", "span", "whole_word"] = "token"
    """What is selected as one."""
    mean_span_length: float = 3.0
    """Of `span`: tokens in a row that are selected, on average; at least 1 / (1 - rate)."""
    begins_word: npt.NDArray[np.bool_] | None = None
    """bool [vocab_size], for `whole_word`: ids that begin a word."""
    ends_word: npt.NDArray[np.bool_] | None = None
    """bool [vocab_size], for `whole_word`: ids after which a word begins: white space."""

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, data: DataConfig) -> "MaskingRule":
        """The rule for a vocabulary.

        Raises:
            UserError: whole words are wanted, and the vocabulary has none.
        """
        is_special = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        is_special[list(tokenizer.special_ids)] = True
        begins_word, ends_word = word_boundaries(tokenizer)
        if data.mask_unit == "whole_word" and not begins_word.any():
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
            begins_word=begins_word,
            ends_word=ends_word,
        )


def word_boundaries(tokenizer: Tokenizer) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """`begins_word` and `ends_word` of a vocabulary, each bool [vocab_size]."""
    pieces = [tokenizer.piece(i).replace("\u2581", " ") for i in range(tokenizer.vocab_size)]
    white = [not piece.strip() or piece in ("<0x09>", "<0x0A>", "<0x0D>", "<0x20>") for piece in pieces]
    begins = [piece[0].isspace() and not blank for piece, blank in zip(pieces, white, strict=True)]
    ends = [blank or piece[-1].isspace() for piece, blank in zip(pieces, white, strict=True)]
    return np.array(begins), np.array(ends)


def rate_at(positions: int, total: int, first: float, final: float | None) -> float:
    """The rate of a step before which `positions` of `total` were dealt: linear from `first` to `final`."""
    return first if final is None else first + (final - first) * min(positions / total, 1.0)


def mask_rows(ids: Ids, row_keys: UInt64, rule: MaskingRule) -> tuple[Ids, Ids]:
    """Corrupt rows.

    Args:
        ids: int64 [B, L]; padding is a special symbol and so stays.
        row_keys: uint64 [B]; all randomness of a row comes from its key and the column.
        rule: rates and vocabulary.

    Returns:
        input_ids int64 [B, L], and labels int64 [B, L] with IGNORED where nothing is predicted.
    """
    # The key first, then the column: so a row's key is mixed once, and only one mixing is done for each position.
    special = rule.is_special[ids]
    random = uniform(row_keys[:, None], 0, np.arange(ids.shape[1])[None, :])
    rows, columns = np.nonzero(_selected(ids, random, special, rule) & ~special)
    keys, chosen = row_keys[rows], ids[rows, columns]
    fate = uniform(keys, 1, columns)
    pieces = np.flatnonzero(~rule.is_special)
    random_ids = pieces[bits(keys, 2, columns) % np.uint64(len(pieces))]
    becomes_random = fate < rule.mask_token_share + rule.random_token_share
    input_ids, labels = ids.copy(), np.full_like(ids, IGNORED)
    input_ids[rows, columns] = np.where(
        fate < rule.mask_token_share, MASK, np.where(becomes_random, random_ids, chosen)
    )
    labels[rows, columns] = chosen
    return input_ids, labels


def _selected(
    ids: Ids, random: npt.NDArray[np.float64], special: npt.NDArray[np.bool_], rule: MaskingRule
) -> npt.NDArray[np.bool_]:
    """bool [B, L]: each position with probability `rate`, in the rule's units; units end at special symbols."""
    columns = np.arange(ids.shape[1])[None, :]
    if rule.unit == "whole_word":
        assert rule.begins_word is not None
        assert rule.ends_word is not None
        begins = special | rule.begins_word[ids]
        begins[:, 1:] |= (special | rule.ends_word[ids])[:, :-1]
        begins[:, 0] = True
        first = np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
        return np.take_along_axis(random, first, axis=1) < rule.rate
    if rule.unit == "span":
        # A chain of two states whose share of selected is `rate` and whose runs last `mean_span_length`: a small number
        # begins a run or goes on with it, a large one ends it, and one between leaves the state as it is. A special
        # symbol draws its state anew, so a run never leads from one document into the next.
        begin = rule.rate / (rule.mean_span_length * (1 - rule.rate))
        end = 1 - 1 / rule.mean_span_length
        fresh = special | (columns == 0)
        decided = fresh | (random < begin) | (random >= end)
        state = np.where(fresh, random < rule.rate, random < begin)
        return np.take_along_axis(state, np.maximum.accumulate(np.where(decided, columns, 0), axis=1), axis=1)
    return random < rule.rate
