"""The masked-language-model corruption of rows, as a pure function of each row's key.

The recipe is BERT's (Devlin et al. 2019): of the tokens selected for prediction most become [MASK], some a random
piece, and the rest stay. Special symbols are neither selected nor drawn.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pretrain.batch import IGNORED
from pretrain.data.counter_random import UInt64, bits, uniform
from pretrain.data.tokenizer import MASK, Tokenizer

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

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Tokenizer, rate: float, mask_token_share: float, random_token_share: float
    ) -> "MaskingRule":
        """The rule for a vocabulary."""
        is_special = np.zeros(tokenizer.vocab_size, dtype=np.bool_)
        is_special[list(tokenizer.special_ids)] = True
        return cls(rate, mask_token_share, random_token_share, is_special)


def mask_rows(ids: Ids, row_keys: UInt64, rule: MaskingRule) -> tuple[Ids, Ids]:
    """Corrupt rows.

    Args:
        ids: int64 [B, L]; padding is a special symbol and so stays.
        row_keys: uint64 [B]; all randomness of a row comes from its key and the column.
        rule: rates and vocabulary.

    Returns:
        input_ids int64 [B, L], and labels int64 [B, L] with IGNORED where nothing is predicted.
    """
    keys, columns = row_keys[:, None], np.arange(ids.shape[1])[None, :]
    selected = (uniform(keys, columns, 0) < rule.rate) & ~rule.is_special[ids]
    labels = np.where(selected, ids, IGNORED)
    fate = uniform(keys, columns, 1)
    becomes_mask = selected & (fate < rule.mask_token_share)
    becomes_random = selected & ~becomes_mask & (fate < rule.mask_token_share + rule.random_token_share)
    pieces = np.flatnonzero(~rule.is_special)
    random_ids = pieces[bits(keys, columns, 2) % np.uint64(len(pieces))]
    return np.where(becomes_mask, MASK, np.where(becomes_random, random_ids, ids)), labels
