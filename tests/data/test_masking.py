"""The corruption of rows: its rates, and what it never touches."""

import numpy as np
import pytest

from pretrain.batch import IGNORED
from pretrain.data.counter_random import bits
from pretrain.data.masking import MaskingRule, mask_rows
from pretrain.data.tokenizer import BOS, EOS, MASK, PAD, UNK

VOCAB = 200
SPECIAL = [PAD, UNK, BOS, EOS, MASK]


def rule(rate: float = 0.3) -> MaskingRule:
    is_special = np.zeros(VOCAB, dtype=bool)
    is_special[SPECIAL] = True
    return MaskingRule(rate, 0.8, 0.1, is_special)


def random_rows(rows: int = 400, length: int = 512) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB, size=(rows, length))


def test_rates_and_shares_are_those_of_the_rule():
    ids = random_rows()
    inputs, labels = mask_rows(ids, bits(1, np.arange(len(ids))), rule())
    maskable = ~np.isin(ids, SPECIAL)
    selected = labels != IGNORED
    assert selected.sum() / maskable.sum() == pytest.approx(0.3, abs=0.005)
    became_mask = (inputs == MASK)[selected].mean()
    stayed = (inputs == ids)[selected].mean()
    assert became_mask == pytest.approx(0.8, abs=0.006)
    assert stayed == pytest.approx(0.1 + 0.1 / (VOCAB - 5), abs=0.005)
    random_ids = inputs[selected & (inputs != ids) & (inputs != MASK)]
    counts = np.bincount(random_ids, minlength=VOCAB)
    assert len(random_ids) == pytest.approx(0.1 * selected.sum(), rel=0.05)
    assert (counts[5:] > 0).all()


def test_special_symbols_are_neither_masked_nor_drawn_and_the_rest_is_untouched():
    ids = random_rows()
    inputs, labels = mask_rows(ids, bits(2, np.arange(len(ids))), rule(0.9))
    special = np.isin(ids, SPECIAL)
    assert (labels[special] == IGNORED).all()
    assert (inputs[special] == ids[special]).all()
    changed = inputs != ids
    assert not np.isin(inputs[changed], [PAD, UNK, BOS, EOS]).any()
    assert (inputs[labels == IGNORED] == ids[labels == IGNORED]).all()
    assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all()


def test_a_rows_mask_depends_on_its_key_alone():
    ids = random_rows(6, 64)
    keys = bits(3, np.arange(6))
    whole = mask_rows(ids, keys, rule())
    alone = mask_rows(ids[[4]], keys[[4]], rule())
    assert (whole[0][4] == alone[0][0]).all()
    assert (whole[1][4] == alone[1][0]).all()
    assert (mask_rows(ids, bits(4, np.arange(6)), rule())[1] != whole[1]).any()
