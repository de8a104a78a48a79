"""The corruption of rows: its rates, and what it never touches."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pretrain.batch import IGNORED
from pretrain.config.parallel import SOLE_READER
from pretrain.data.counter_random import bits
from pretrain.data.stream import loader
from pretrain.data.stream.loader import training_steps
from pretrain.data.stream.masking import MaskingRule, mask_rows, rate_at, word_boundaries
from pretrain.data.stream.state import StreamState
from pretrain.data.tokenizer import BOS, EOS, MASK, PAD, UNK, Tokenizer
from tests.data.stream.test_stream import first_steps, rows_of

VOCAB = 200
SPECIAL = [PAD, UNK, BOS, EOS, MASK]


def rule(rate: float = 0.3, **fields) -> MaskingRule:
    is_special = np.zeros(VOCAB, dtype=bool)
    is_special[SPECIAL] = True
    return MaskingRule(rate, 0.8, 0.1, is_special, **fields)


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


def runs_of(selected: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True in each row, together."""
    padded = np.pad(selected, ((0, 0), (1, 1))).astype(np.int8)
    changes = np.diff(padded, axis=1)
    return np.argwhere(changes == -1)[:, 1] - np.argwhere(changes == 1)[:, 1]


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3.0), (0.3, 5.0), (0.5, 2.0)])
def test_spans_have_the_rate_and_the_mean_length_of_the_rule_and_end_with_a_document(rate, mean):
    ids = random_rows()
    ids[np.isin(ids, SPECIAL)] = 7
    ids[:, 0], ids[:, 200], ids[:, 201] = BOS, EOS, BOS
    spans = rule(rate, unit="span", mean_span_length=mean)
    inputs, labels = mask_rows(ids, bits(5, np.arange(len(ids))), spans)
    selected = labels != IGNORED
    assert selected.sum() / (~np.isin(ids, SPECIAL)).sum() == pytest.approx(rate, rel=0.03)
    lengths = runs_of(selected[:, 300:500])
    assert lengths.mean() == pytest.approx(mean, rel=0.06)
    for column in (1, 202, 511):
        assert selected[:, column].mean() == pytest.approx(rate, abs=0.08)
    assert (inputs == MASK)[selected].mean() == pytest.approx(0.8, abs=0.01)


def test_a_span_never_leads_from_one_document_into_the_next():
    ids = np.full((4000, 64), 7)
    ids[:, 0], ids[:, 30], ids[:, 31] = BOS, EOS, BOS
    spans = rule(0.3, unit="span", mean_span_length=10.0)
    selected = mask_rows(ids, bits(7, np.arange(len(ids))), spans)[1] != IGNORED
    assert np.corrcoef(selected[:, 26], selected[:, 29])[0, 1] > 0.5
    assert abs(np.corrcoef(selected[:, 29], selected[:, 32])[0, 1]) < 0.05


def test_every_position_draws_its_random_piece_independently_of_its_neighbours():
    ids = np.full((200, 64), 7)
    all_random = replace(rule(1.0), mask_token_share=0, random_token_share=1)
    drawn, _ = mask_rows(ids, bits(8, np.arange(len(ids))), all_random)
    for distance in (1, 2, 64):
        same = (drawn.ravel()[distance:] == drawn.ravel()[:-distance]).mean()
        assert same == pytest.approx(1 / (VOCAB - len(SPECIAL)), abs=0.003)


def test_whole_words_are_masked_together_and_single_tokens_at_the_rate():
    begins, ends = np.zeros(VOCAB, dtype=bool), np.zeros(VOCAB, dtype=bool)
    begins[5:80], ends[190:] = True, True
    ids = random_rows()
    ids[ids == UNK] = 7
    words = rule(0.3, unit="whole_word", begins_word=begins, ends_word=ends)
    selected = mask_rows(ids, bits(6, np.arange(len(ids))), words)[1] != IGNORED
    special = np.isin(ids, SPECIAL)
    continues = ~begins[ids[:, 1:]] & ~special[:, 1:] & ~special[:, :-1] & ~ends[ids[:, :-1]]
    assert (selected[:, 1:] == selected[:, :-1])[continues].all()
    assert (selected[:, 1:] != selected[:, :-1])[~continues].mean() > 0.3
    assert selected.sum() / (~special).sum() == pytest.approx(0.3, abs=0.01)


def test_words_begin_at_spaces_and_after_line_breaks(corpus_values):
    tokenizer = Tokenizer(Path(corpus_values["path"]) / "tokenizer.model")
    begins, ends = word_boundaries(tokenizer)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    for piece, begin, end in zip(pieces, begins, ends, strict=True):
        assert begin == (piece.startswith("\u2581") and piece.strip("\u2581") != ""), piece
        assert end == piece.endswith("\u2581"), piece


def test_the_rate_goes_from_first_to_final_over_the_positions_dealt_and_survives_a_resume(make_config, manifest):
    assert [rate_at(n, 100, 0.4, 0.2) for n in (0, 50, 100, 200)] == pytest.approx([0.4, 0.3, 0.2, 0.2])
    assert rate_at(50, 100, 0.4, None) == 0.4
    data = {"mask_rate": 0.6, "final_mask_rate": 0.1, "packing": "packed", "mask_unit": "span"}
    config = make_config(data={**data, "workers": 2}, training={"tokens": 16 * 32 * 20})
    steps = first_steps(config, manifest, 30)[0]
    rates = [step.batch.num_masked / step.batch.num_tokens for step in steps]
    assert np.mean(rates[:3]) == pytest.approx(0.55, abs=0.08)
    assert np.mean(rates[21:]) == pytest.approx(0.1, abs=0.03)
    assert steps[-1].state.positions == 30 * 16 * 32
    again = next(training_steps(config, manifest, StreamState.from_json(steps[9].state.to_json()), SOLE_READER))
    assert again.batch.labels.equal(steps[10].batch.labels)
    assert rows_of(first_steps(make_config(data=data, training={"tokens": 16 * 32 * 20}), manifest, 30, 2)) == rows_of(
        [steps]
    )


def test_the_rate_of_a_step_is_that_of_the_positions_dealt_before_it(make_config, manifest, monkeypatch):
    asked = []
    monkeypatch.setattr(
        loader, "rate_at", lambda positions, *rule: asked.append(positions) or rate_at(positions, *rule)
    )
    config = make_config(data={"workers": 0, "mask_rate": 0.6, "final_mask_rate": 0.1})
    steps = training_steps(config, manifest, StreamState.start(config.data.streams), SOLE_READER)
    list(islice(steps, 3))
    assert asked[:3] == [0, 16 * 32, 2 * 16 * 32]
