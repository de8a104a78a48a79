"""Tasks that need no data, attention statistics, and the arithmetic under the report."""

import math

import numpy as np
import pytest
import torch

from pretrain.batch import IGNORED
from pretrain.data.tokenizer import BOS, EOS, MASK
from pretrain.evaluation.context.attention_statistics import FIELDS, distance_bounds, triangle_statistics
from pretrain.evaluation.context.results.statistics import DocumentBootstrap, doubling_bins, entropy_of_counts, wilson
from pretrain.evaluation.context.tasks import (
    CANDIDATES,
    DEPTHS,
    DISTRACTORS,
    SPAN,
    Vocabulary,
    distances_at,
    draw_rows,
    num_rows,
)
from pretrain.evaluation.report.schema import EDGE_TOKENS


@pytest.fixture
def vocabulary() -> Vocabulary:
    counts, special = np.arange(200), np.zeros(200, dtype=bool)
    special[:5] = True
    return Vocabulary.from_counts(counts, special, 7)


@pytest.mark.parametrize("task", ["passkey", "multikey", "copy"])
def test_what_is_masked_stands_at_the_distance_on_the_side(vocabulary, task):
    drawn = draw_rows(task, 256, 64, 3, vocabulary, 7)
    assert len(drawn.inputs) == num_rows(256, 64, 3) == len(distances_at(256, 64)) * len(DEPTHS) * 2 * 3
    for row in range(len(drawn.inputs)):
        columns = np.flatnonzero(drawn.targets[row] != IGNORED)
        assert len(columns) == (2 if task == "copy" else 4)
        assert (drawn.inputs[row, columns] == MASK).all()
        shift = -drawn.distances[row] if drawn.sides[row] == 0 else drawn.distances[row]
        assert (drawn.inputs[row, columns + shift] == drawn.targets[row, columns]).all()
        assert np.isin(drawn.targets[row, columns], vocabulary.candidates).all()
        assert (drawn.inputs[row] == MASK).sum() == len(columns)
    assert (drawn.inputs[:, 0] == BOS).all()
    assert (drawn.inputs[:, -1] == EOS).all()
    again = draw_rows(task, 256, 64, 3, vocabulary, 7)
    assert np.array_equal(again.inputs, drawn.inputs)
    assert not np.array_equal(draw_rows(task, 256, 64, 3, vocabulary, 8).inputs, drawn.inputs)


def test_other_pairs_of_multikey_overlap_neither_the_right_one_nor_each_other():
    """Where all filler is one piece, the tokens of pairs stand out: so many, none written over another."""
    pieces = np.arange(5, 100_005)
    vocabulary = Vocabulary(pieces, np.ones(len(pieces)), candidates=pieces[-CANDIDATES:])
    drawn = draw_rows("multikey", 256, 64, 3, vocabulary, 7)
    assert set((drawn.inputs != pieces[0]).sum(axis=1)) == {2 + (2 + DISTRACTORS) * SPAN}


def test_filler_is_drawn_by_how_often_pieces_occur():
    counts, special = np.array([0, 0, 600, 300, 98, *[0] * 20]), np.zeros(25, dtype=bool)
    special[:2] = True
    vocabulary = Vocabulary.from_counts(counts, special, 7)
    filler = draw_rows("passkey", 1024, 1024, 1, vocabulary, 7).inputs[:, 1:-1]
    shares = [(filler == piece).mean() for piece in (2, 3, 4)]
    # A count of one is added to each of ten pieces, and two halves of a pair take 16 of the 1,022 places.
    assert shares == pytest.approx([601 / 1008, 301 / 1008, 99 / 1008], abs=0.02)


def test_distances_double_up_to_the_end_of_the_row():
    assert distances_at(128, 128) == [32, 64, 112]
    assert distances_at(1024, 128) == [32, 64, 128, 256, 512, 1008]
    assert distances_at(32, 32) == [8, 16]
    assert distances_at(16, 16) == []


def test_candidates_are_a_few_frequent_pieces(vocabulary):
    assert len(set(vocabulary.candidates.tolist())) == CANDIDATES
    assert vocabulary.chance == 0.1
    assert vocabulary.candidates.min() >= 100


def test_tasks_of_a_run_count_their_answers(evaluated):
    report = evaluated.report
    plain = [t for t in report.tasks if t.reading == "plain"]
    assert {(t.task, t.multiple) for t in plain} == {(t, m) for t in ("passkey", "copy") for m in (1, 2, 4, 8)}
    assert {t.reading for t in report.tasks} == {"plain", "without_past", "without_future"}
    for task in plain:
        assert task.answers == sum(c.answers for c in task.cells)
        mean = sum(c.accuracy * c.answers for c in task.cells) / task.answers
        assert mean == pytest.approx(task.accuracy)
        assert task.accuracy_interval[0] <= task.accuracy <= task.accuracy_interval[1]


# ------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("window", [None, 5])
def test_even_attention_has_the_entropy_of_what_it_sees(window):
    q, k = torch.zeros(2, 40, 3, 8), torch.randn(2, 40, 3, 8)
    past, future = triangle_statistics(q, k, "dual_triangle", window).tolist()
    seen = [min(i + 1, window or 40) for i in range(40)]
    expected = np.mean(np.log(seen))
    for values in (past, future):
        fields = dict(zip(FIELDS, values, strict=False))
        assert fields["entropy"] == pytest.approx(expected, abs=1e-5)
        assert fields["uniform_entropy"] == pytest.approx(expected, abs=1e-5)
        assert fields["largest_logit"] == 0
        assert sum(values[len(FIELDS) :]) == pytest.approx(1, abs=1e-5)
        assert values[len(FIELDS)] == pytest.approx(np.mean([1 / n for n in seen]), abs=1e-5)


def test_a_sink_in_the_first_tokens_is_seen_by_queries_that_stand_elsewhere():
    q, k = torch.ones(1, 128, 1, 4), torch.zeros(1, 128, 1, 4)
    k[:, :EDGE_TOKENS] = 20.0
    (values,) = triangle_statistics(q, k, "causal", None).tolist()
    fields = dict(zip(FIELDS, values, strict=False))
    assert fields["first_tokens"] == pytest.approx(1, abs=1e-6)
    assert fields["last_tokens"] == pytest.approx(0, abs=1e-6)
    assert fields["largest_logit"] == pytest.approx(20 * 4 / 2)
    assert distance_bounds(128) == [0, 1, 2, 4, 8, 16, 32, 64]


def test_attention_of_a_run_is_told_for_every_triangle_of_every_layer(evaluated):
    keys = {(a.multiple, a.layer, a.triangle) for a in evaluated.report.attention}
    assert keys == {(m, layer, t) for m in (1, 2, 4, 8) for layer in (1, 2) for t in ("past", "future")}
    for a in evaluated.report.attention:
        assert 0 < a.entropy <= a.uniform_entropy
        assert sum(a.by_distance) == pytest.approx(1, abs=1e-4)


# ------------------------------------------------------------------------------------------------------- statistics


def test_intervals_come_from_documents_not_from_targets():
    generator = np.random.default_rng(0)
    documents = np.repeat(np.arange(20), 500)
    values = generator.normal(size=20)[documents]
    estimate = DocumentBootstrap(documents, 1).mean(values)
    half = (estimate.interval[1] - estimate.interval[0]) / 2
    assert half == pytest.approx(1.96 * values[::500].std() / math.sqrt(20), rel=0.15)
    chosen = documents < 3
    assert DocumentBootstrap(documents, 1).mean(values, chosen).value == pytest.approx(values[chosen].mean())


def test_shares_bins_and_entropy():
    low, high = wilson(5, 10)
    assert (low, high) == (pytest.approx(0.2366, abs=1e-3), pytest.approx(0.7634, abs=1e-3))
    assert wilson(0, 0) == (0, 1)
    assert doubling_bins(8, 20) == [(0, 8), (8, 16), (16, 32)]
    assert entropy_of_counts(np.array([5.0, 5.0, 0.0])) == pytest.approx(math.log(2))
