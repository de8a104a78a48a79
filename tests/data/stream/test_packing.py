"""Rows made of documents: everything once, nothing too long, nearly no padding, no order by length."""

import os
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config.load import load_config
from pretrain.config.parallel import SOLE_READER
from pretrain.data.build.corpus import build_corpus
from pretrain.data.manifest import load_manifest
from pretrain.data.stream.loader import training_steps
from pretrain.data.stream.packing import PackingRule, plan_rows, remaining_spans, whole_documents
from pretrain.data.stream.reader import RowSource
from pretrain.data.stream.state import StreamState
from pretrain.data.tokenizer import BOS, EOS
from pretrain.model.layout import AttentionLayout
from pretrain.run.opening import open_run_folder
from tests.data.stream.test_stream import ids_of
from tests.ranks import run_on_ranks, trainer_of

REAL_DATA = Path(os.environ.get("DIPTYCH_DATA", Path(__file__).parents[4] / "shared/data"))
ROOT = Path(__file__).parents[3]
PACKINGS = ("padded", "packed", "concatenated")


def positions_of(plan) -> Counter:
    """How often each (document, position) occurs in the plan."""
    pieces = zip(plan.samples.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True)
    return Counter((sample, start + i) for sample, start, length in pieces for i in range(length))


def filled(plan, length: int) -> float:
    return plan.lengths.sum() / (len(plan) * length)


@given(
    st.lists(st.integers(0, 50), max_size=40),
    st.integers(8, 20),
    st.sampled_from(PACKINGS),
    st.sampled_from(["full", "even"]),
    st.integers(0, 5),
)
@settings(deadline=None)
def test_every_position_of_every_document_is_in_exactly_one_row_and_no_row_overflows(lengths, row, packing, cut, key):
    plan = plan_rows(whole_documents(np.array(lengths, dtype=np.int64)), PackingRule(row, packing, cut), key)
    assert positions_of(plan) == Counter((s, i) for s, n in enumerate(lengths) for i in range(n + 2))
    sizes = [int(plan.lengths[a:b].sum()) for a, b in zip(plan.bounds, plan.bounds[1:], strict=False)]
    assert all(0 < size <= row for size in sizes)
    assert sum(sizes) == sum(lengths) + 2 * len(lengths)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.sampled_from(PACKINGS), st.floats(0, 1))
@settings(deadline=None)
def test_what_is_left_of_a_plan_can_be_planned_again_at_another_length(lengths, packing, share):
    documents = whole_documents(np.array(lengths, dtype=np.int64))
    plan = plan_rows(documents, PackingRule(8, packing), 1)
    rows = int(share * len(plan))
    again = plan_rows(remaining_spans(plan, rows), PackingRule(32, packing), 2)
    first = plan.bounds[rows]
    taken = positions_of(type(plan)(plan.samples[:first], plan.starts[:first], plan.lengths[:first], plan.bounds))
    assert taken + positions_of(again) == positions_of(plan)


@given(st.lists(st.integers(0, 12), max_size=40), st.integers(14, 30))
@settings(deadline=None)
def test_packing_puts_every_piece_long_ones_first_into_the_fullest_row_that_still_holds_it(lengths, row):
    rooms: list[int] = []
    for size in sorted((length + 2 for length in lengths), reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else row) - size)
    plan = plan_rows(whole_documents(np.array(lengths, dtype=np.int64)), PackingRule(row, "packed"), 1)
    sizes = [plan.lengths[a:b].sum() for a, b in pairwise(plan.bounds)]
    assert sorted(row - size for size in sizes) == sorted(rooms)


def test_a_plan_cuts_long_documents_and_keeps_short_ones_whole():
    documents = whole_documents(np.array([3, 0, 20]))
    for cut, of_long in (("full", [(2, 0, 8), (2, 8, 8), (2, 16, 6)]), ("even", [(2, 0, 7), (2, 7, 7), (2, 14, 8)])):
        plan = plan_rows(documents, PackingRule(8, "padded", cut), 1)
        pieces = sorted(zip(plan.samples.tolist(), plan.starts.tolist(), plan.lengths.tolist(), strict=True))
        assert pieces == [(0, 0, 5), (1, 0, 2), *of_long]
        packed = plan_rows(documents, PackingRule(8, "packed", cut), 1)
        assert positions_of(packed) == positions_of(plan)
        assert len(packed) == 4


def test_packing_fills_rows_of_many_lengths_and_a_large_shard_is_planned_in_no_time():
    lengths = np.random.default_rng(0).lognormal(5.5, 0.9, 100_000).astype(np.int64)
    for row in (128, 512, 2048):
        documents = whole_documents(lengths)
        began = time.process_time()
        plan = plan_rows(documents, PackingRule(row, "packed"), 1)
        assert time.process_time() - began < 2
        assert filled(plan, row) > 0.98
        assert filled(plan_rows(documents, PackingRule(row, "concatenated"), 1), row) > 0.9999


def test_where_a_document_stands_in_its_row_says_nothing_about_its_length():
    lengths = np.random.default_rng(1).integers(5, 200, 100_000)
    plan = plan_rows(whole_documents(lengths), PackingRule(512, "packed"), 1)
    sizes = np.diff(plan.bounds)
    several = sizes > 1
    firsts, lasts = plan.lengths[plan.bounds[:-1][several]], plan.lengths[plan.bounds[1:][several] - 1]
    assert firsts.mean() == pytest.approx(lasts.mean(), rel=0.02)
    halves = [firsts[: len(firsts) // 2].mean(), firsts[len(firsts) // 2 :].mean()]
    assert halves[0] == pytest.approx(halves[1], rel=0.03)


def test_another_key_packs_other_documents_together():
    documents = whole_documents(np.random.default_rng(1).integers(5, 60, 500))
    one, two = (plan_rows(documents, PackingRule(64, "packed"), key) for key in (1, 2))
    together = [
        {frozenset(plan.samples[a:b].tolist()) for a, b in zip(plan.bounds, plan.bounds[1:], strict=False) if b > a + 1}
        for plan in (one, two)
    ]
    assert len(together[0] & together[1]) < 0.2 * len(together[0])


def test_packed_batches_hold_whole_documents_with_their_symbols(make_config, manifest):
    config = make_config(data={"packing": "packed", "sequence_length": 128})
    source = RowSource(config.corpus.path, manifest, "train", config.seed, [PackingRule(128, "packed")])
    shard, plan = source.open(0)
    seen = 0
    for number, (ids, documents, positions) in enumerate(zip(*ids_of(shard, plan, range(len(plan)), 128), strict=True)):
        pieces = range(int(plan.bounds[number]), int(plan.bounds[number + 1]))
        for document, piece in enumerate(pieces, start=1):
            sample, start, length = int(plan.samples[piece]), int(plan.starts[piece]), int(plan.lengths[piece])
            whole = [BOS, *shard.tokens(sample, 0, int(shard.lengths[sample])).tolist(), EOS]
            assert ids[documents == document].tolist() == whole[start : start + length]
            assert positions[documents == document].tolist() == list(range(length))
            seen += length
        filled = (documents > 0).sum()
        assert documents[:filled].tolist() == sorted(documents[:filled])
        assert not ids[filled:].any()
        assert not positions[filled:].any()
    assert seen == (shard.lengths + 2).sum()
    batch = next(training_steps(config, manifest, StreamState.start(16), SOLE_READER)).batch
    assert not AttentionLayout.from_batch(batch).one_document_per_row
    assert batch.num_tokens > 0.9 * batch.input_ids.numel()


def train(rank, config):
    return trainer_of(config, rank, 1).fit()


@pytest.mark.slow
def test_packed_rows_train_with_the_dense_kernel(make_config, manifest, tmp_path):
    config = make_config(
        data={"packing": "packed", "sequence_length": 64}, model={"kernel": "dense"}, training={"tokens": 3_000}
    )
    open_run_folder(config, manifest)
    assert run_on_ranks(train, 1, tmp_path / "ranks", config) == [0]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"no {REAL_DATA}; set DIPTYCH_DATA")
@pytest.mark.parametrize(("name", "length"), [("books", 128), ("books", 512), ("proteins", 256), ("proteins", 1024)])
def test_real_corpora_fill_more_than_98_percent(name, length, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIPTYCH_DATA", str(REAL_DATA))
    path = tmp_path_factory.getbasetemp() / f"packed-{name}"
    config = load_config(str(ROOT / f"configs/data/{name}.yaml"), [f"corpus.path={path}"])
    build_corpus(config.corpus)
    source = RowSource(path, load_manifest(path), "train", 1, [PackingRule(length, "packed")])
    plans = [source.open(visit)[1] for visit in range(source.num_shards)]
    share = sum(plan.lengths.sum() for plan in plans) / (sum(map(len, plans)) * length)
    print(f"{name}, rows of {length}: {share:.2%} filled")
    assert share > 0.98
