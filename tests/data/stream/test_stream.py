"""The order of rows: the same on any number of ranks and workers, whole in every epoch, resumed exactly."""

import shutil
from collections import Counter
from hashlib import sha256
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from pretrain.batch import IGNORED
from pretrain.config.data import CorpusConfig
from pretrain.config.parallel import SOLE_READER, DataRank
from pretrain.data.build.corpus import build_corpus
from pretrain.data.counter_random import bits
from pretrain.data.manifest import load_manifest
from pretrain.data.stream.loader import StepRows, training_steps, validation_batches
from pretrain.data.stream.masking import MaskingRule, mask_rows
from pretrain.data.stream.packing import PackingRule, plan_rows, whole_documents
from pretrain.data.stream.reader import RowSource, StreamReader
from pretrain.data.stream.rows import UnmaskedRows, Visit, read_rows
from pretrain.data.stream.state import StreamState
from pretrain.data.tokenizer import BOS, EOS, PAD
from pretrain.errors import UserError


def rows_of(steps: list[list[StepRows]]) -> list[bytes]:
    """Rows with their masks in global order, from each rank's list of steps."""
    world_size, rows = len(steps), []
    for step in zip(*steps, strict=True):
        per_rank = [list(zip(s.batch.input_ids.numpy(), s.batch.labels.numpy(), strict=True)) for s in step]
        for number in range(sum(map(len, per_rank))):
            ids, labels = per_rank[number % world_size][number // world_size]
            rows.append(ids.tobytes() + labels.tobytes())
    return rows


def ids_of(shard, plan, numbers, length=32):
    """Rows of a plan as (ids, documents, positions), each int64 [rows, length]."""
    rows = UnmaskedRows(*np.empty((3, len(numbers), length), dtype=np.int64))
    read_rows([(Visit(shard, plan), np.array(numbers), np.arange(len(numbers)))], rows)
    return rows.ids, rows.document_ids, rows.position_ids


def first_steps(config, manifest, count, world_size=1, states=None):
    states = states or [StreamState.start(config.data.streams)] * world_size
    return [
        list(islice(training_steps(config, manifest, states[rank], DataRank(rank, world_size)), count))
        for rank in range(world_size)
    ]


def merged(states: list[StreamState]) -> StreamState:
    """What a checkpoint holds: each stream's state from the rank that reads it."""
    streams, world_size = len(states[0].visits), len(states)
    parts = [state.of_streams(range(rank, streams, world_size)) for rank, state in enumerate(states)]
    return StreamState.from_json(states[0].merged(parts).to_json())


def test_order_is_the_same_on_any_number_of_ranks_across_an_epochs_end(make_config, manifest):
    config = make_config(data={"packing": "packed"})
    source = RowSource(config.corpus.path, manifest, "train", config.seed, [PackingRule(32, "packed")])
    epoch = sum(len(source.open(visit)[1]) for visit in range(source.num_shards))
    steps = epoch * 5 // 4 // 16
    expected = rows_of(first_steps(config, manifest, steps))
    assert len(set(expected)) > 0.95 * epoch
    for world_size in (2, 4):
        assert rows_of(first_steps(config, manifest, steps, world_size)) == expected, world_size


@pytest.fixture(scope="session")
def two_sources(corpus_values, tmp_path_factory):
    """The `corpus` section of a corpus of two sources, built already."""
    raw, folder = corpus_values["sources"][0]["path"], tmp_path_factory.mktemp("two")
    sources = [{"path": f"{raw}/00*.txt", "name": "few"}, {"path": f"{raw}/[12]*.txt", "name": "many"}]
    values = {**corpus_values, "path": str(folder / "corpus"), "sources": sources}
    build_corpus(CorpusConfig.model_validate(values))
    return values


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["padded", "packed", "concatenated"])
def test_ten_thousand_rows_of_weighted_sources_are_the_same_on_any_ranks_and_workers(make_config, two_sources, packing):
    data = {"packing": packing, "source_weights": {"few": 2.5, "many": 0.6}}
    manifest = load_manifest(Path(two_sources["path"]))
    training = {"batch_size": 80, "micro_batch_size": 4}
    hashes = {}
    for world_size in (1, 2, 4):
        for workers in (0, 1, 4):
            config = make_config(corpus=two_sources, data={**data, "workers": workers}, training=training)
            steps = first_steps(config, manifest, 10_000 // 80, world_size)
            hashes[world_size, workers] = sha256(b"".join(rows_of(steps))).hexdigest()
    assert merged([rank[-1].state for rank in steps]).visits.min() >= 1, "it goes beyond an epoch's end"
    assert len(hashes) == 9
    assert set(hashes.values()) == {hashes[1, 0]}, hashes


@pytest.mark.parametrize("packing", ["padded", "packed"])
def test_three_resumes_in_a_row_on_other_ranks_and_workers_continue_the_sequence(make_config, manifest, packing):
    expected = rows_of(first_steps(make_config(data={"packing": packing}), manifest, 40))
    state, rows = StreamState.start(16), []
    for world_size, workers, count in ((1, 0, 1), (2, 2, 13), (4, 1, 9), (1, 3, 17)):
        config = make_config(data={"workers": workers, "packing": packing})
        steps = first_steps(config, manifest, count, world_size, [state] * world_size)
        rows += rows_of(steps)
        state = merged([rank[-1].state for rank in steps])
    assert rows == expected


def test_every_document_is_read_exactly_once_in_every_visit_of_its_shard(make_config, manifest):
    config = make_config()
    source = RowSource(config.corpus.path, manifest, "train", config.seed, [PackingRule(32)])
    for epoch in range(2):
        seen: Counter[bytes] = Counter()
        for visit in range(epoch * source.num_shards, (epoch + 1) * source.num_shards):
            shard, plan = source.open(visit)
            ids, documents, _ = ids_of(shard, plan, range(len(plan)))
            assert ((ids == PAD) == (documents == 0)).all()
            assert ((documents != 0).sum(axis=1) == plan.lengths).all()
            pieces = {(s, t): n for s, t, n in zip(plan.samples, plan.starts, plan.lengths, strict=True)}
            assert len(pieces) == len(plan)
            for sample, length in enumerate(shard.lengths):
                assert sum(n for (s, _), n in pieces.items() if s == sample) == length + 2
            seen[shard.tokens(0, 0, 5).tobytes() + bytes(shard.lengths)] += 1
        assert set(seen.values()) == {1}
        assert len(seen) == source.num_shards


def test_rows_are_the_documents_with_begin_and_end_symbols(make_config, manifest):
    config = make_config()
    source = RowSource(config.corpus.path, manifest, "train", config.seed, [PackingRule(32)])
    shard, plan = source.open(0)
    sample = int(np.argmax(shard.lengths))
    rows = sorted(np.flatnonzero(plan.samples == sample), key=lambda row: plan.starts[row])
    ids, documents, _ = ids_of(shard, plan, range(len(plan)))
    joined = np.concatenate([ids[row][documents[row] > 0] for row in rows])
    expected = [BOS, *shard.tokens(sample, 0, int(shard.lengths[sample])).tolist(), EOS]
    assert joined.tolist() == expected


def test_epochs_and_seeds_have_orders_of_their_own(make_config, manifest):
    def source(seed: int) -> RowSource:
        return RowSource(make_config().corpus.path, manifest, "train", seed, [PackingRule(32)])

    def opening(seed: int, visit: int) -> list[int]:
        return source(seed).open(visit)[1].starts[:20].tolist()

    assert opening(1, 0) == opening(1, 0)
    assert opening(1, 0) != opening(2, 0)
    num = source(1).num_shards
    orders = [[source(seed).entry(epoch * num + n).path for n in range(num)] for seed in (1, 2) for epoch in range(3)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


def test_a_stream_state_that_is_taken_with_a_row_ignores_what_was_read_ahead(make_config, manifest):
    config = make_config(data={"workers": 3})
    steps = training_steps(config, manifest, StreamState.start(16), SOLE_READER)
    taken = list(islice(steps, 2))
    assert taken[-1].state.position == 32
    again = training_steps(make_config(), manifest, taken[0].state, SOLE_READER)
    assert next(again).batch.input_ids.equal(taken[1].batch.input_ids)


def test_validation_rows_are_the_same_on_any_number_of_ranks(make_config, manifest):
    config = make_config(training={"validation_rows": 37})

    def rows(world_size: int) -> list[bytes]:
        ranks = [DataRank(rank, world_size) for rank in range(world_size)]
        batches = [batch for rank in ranks for batch in validation_batches(config, manifest, rank, 8)]
        pairs = [(i, x) for b in batches for i, x in zip(b.input_ids.numpy(), b.labels.numpy(), strict=True)]
        return sorted(i.tobytes() + x.tobytes() for i, x in pairs if i.any())

    counts = [len(list(validation_batches(config, manifest, DataRank(rank, 4), 8))) for rank in range(4)]
    assert len(rows(1)) == 37
    assert rows(1) == rows(2) == rows(4)
    assert len(set(counts)) == 1


def test_validation_rows_are_masked_independently_of_the_training_rows_of_the_same_numbers(make_config, manifest):
    config = make_config(data={"mask_rate": 0.5}, training={"batch_size": 32, "validation_rows": 32})
    training = next(training_steps(config, manifest, StreamState.start(16), SOLE_READER)).batch
    validation = next(validation_batches(config, manifest, SOLE_READER, 32))
    text = (training.input_ids > EOS) & (validation.input_ids > EOS)
    agree = (training.labels == IGNORED) == (validation.labels == IGNORED)
    assert agree[text].float().mean() == pytest.approx(0.5, abs=0.06)


def test_fewer_shards_than_streams_are_refused(make_config, manifest):
    few = manifest.splits["train"].model_copy(update={"shards": manifest.splits["train"].shards[:3]})
    small = manifest.model_copy(update={"splits": {**manifest.splits, "train": few}})
    with pytest.raises(UserError, match=r"3 training shards for data.streams = 16; use data.streams=3"):
        training_steps(make_config(), small, StreamState.start(16), SOLE_READER)


def test_a_damaged_shard_is_named_before_anything_of_it_is_read(manifest, tmp_path, corpus_values):
    copy = tmp_path / "copy"
    shutil.copytree(corpus_values["path"], copy)
    victim = copy / manifest.splits["train"].shards[3].path
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    source = RowSource(copy, load_manifest(copy), "train", 7, [PackingRule(32)])
    with pytest.raises(UserError, match=f"{victim.name} is damaged"):
        [source.open(visit) for visit in range(source.num_shards)]


def test_the_order_of_an_earlier_version_is_refused_and_this_ones_is_fixed(make_config, manifest):
    state = first_steps(make_config(), manifest, 1)[0][0].state
    assert StreamState.from_json(state.to_json()).to_json() == state.to_json()
    earlier = {name: value for name, value in state.to_json().items() if name != "order"}
    for old in (StreamState.from_json(earlier), StreamState.from_json(earlier).in_phase(1)):
        with pytest.raises(UserError, match="rows are in order 1, and this version of Diptych makes order 2"):
            training_steps(make_config(), manifest, old, SOLE_READER)
    # If these change, rows or masks do: raise ORDER.
    plan = plan_rows(whole_documents(np.arange(40) * 7), PackingRule(64, "packed"), 5)
    assert sha256(np.concatenate(list(vars(plan).values())).tobytes()).hexdigest()[:12] == "e46afd8e1e9b"
    rule = MaskingRule(0.2, 0.8, 0.1, np.arange(100) < 5)
    masked = mask_rows(np.arange(990).reshape(10, 99) % 100, bits(3, np.arange(10)), rule)
    assert sha256(np.concatenate(masked).tobytes()).hexdigest()[:12] == "edbbb65fec85"


def test_rows_that_are_only_counted_move_the_stream_as_rows_that_are_read_do(make_config, manifest):
    config = make_config()
    source = RowSource(config.corpus.path, manifest, "train", config.seed, [PackingRule(32)])
    counted, read = (StreamReader(source, StreamState.start(16)) for _ in range(2))
    assert counted.take(50).numbers.tolist() == list(range(50))
    for count in (7, 1, 42):
        taken = read.take(count)
        read.read(taken, UnmaskedRows(*np.empty((3, count, 32), dtype=np.int64)))
    assert counted.state.to_json() == read.state.to_json()


@pytest.mark.parametrize("packing", ["padded", "packed", "concatenated"])
def test_rows_do_not_depend_on_how_many_are_read_at_once_or_in_which_order(make_config, manifest, packing):
    config = make_config()
    source = RowSource(config.corpus.path, manifest, "train", config.seed, [PackingRule(32, packing)])
    opened = [source.open(visit) for visit in range(3)]
    alone = [[ids_of(*visit, [row]) for row in range(20)] for visit in opened]
    random = np.random.default_rng(0)
    for _ in range(20):
        numbers = [np.sort(random.choice(20, random.integers(1, 20), replace=False)) for _ in opened]
        places = np.split(random.permutation(sum(map(len, numbers))), np.cumsum([len(n) for n in numbers])[:-1])
        rows = UnmaskedRows(*np.empty((3, sum(map(len, numbers)), 32), dtype=np.int64))
        read_rows([(Visit(*o), n, p) for o, n, p in zip(opened, numbers, places, strict=True)], rows)
        for visit, (of_visit, at) in enumerate(zip(numbers, places, strict=True)):
            for number, place in zip(of_visit, at, strict=True):
                for expected, found in zip(alone[visit][number], vars(rows).values(), strict=True):
                    assert (expected[0] == found[place]).all()
