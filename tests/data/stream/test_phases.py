"""A curriculum: other rows from a token count on, nothing lost or repeated at the boundary, weights in the long run."""

import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest

from pretrain.config.load import validate
from pretrain.config.parallel import SOLE_READER
from pretrain.data.build.corpus import build_corpus
from pretrain.data.stream.loader import training_steps
from pretrain.data.stream.packing import PackingRule, repeats_of
from pretrain.data.stream.reader import RowSource, StreamReader
from pretrain.data.stream.state import StreamState
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from tests.data.stream.test_stream import first_steps, merged, rows_of
from tests.ranks import run_on_ranks, trainer_of

PHASES = [{"from_tokens": 3_000, "sequence_length": 64, "batch_size": 8, "mask_rate": 0.4, "rotary_theta": 50_000.0}]


def with_phases(config, phases):
    return validate({**config.model_dump(mode="json"), "phases": phases}, "test")


@pytest.mark.parametrize("packing", ["padded", "packed", "concatenated"])
def test_a_boundary_inside_a_visit_loses_and_repeats_nothing(make_config, manifest, packing):
    config = make_config()
    rules = [PackingRule(length, packing) for length in (32, 64, 16)]
    state, seen = StreamState.start(1), Counter()
    whole, plan = RowSource(config.corpus.path, manifest, "train", 7, rules[:1]).open(0)
    expected = Counter({(s, i): 1 for s, n in enumerate(whole.lengths) for i in range(n + 2)})
    for phase, count in ((0, 5), (1, 3), (2, math.inf)):
        state = state.in_phase(phase)
        source = RowSource(config.corpus.path, manifest, "train", 7, rules[: phase + 1])
        reader = StreamReader(source, StreamState.from_json(state.to_json()))
        plan = source.open(0, state.rows[0].tolist())[1]
        for row in range(min(count, len(plan))):
            reader.take(1)
            assert reader.state.visits[0] == 0
            for piece in range(plan.bounds[row], plan.bounds[row + 1]):
                start = int(plan.starts[piece])
                seen.update((int(plan.samples[piece]), start + i) for i in range(plan.lengths[piece]))
        state = reader.state
    assert seen == expected
    reader.take(1)
    assert reader.state.visits[0] == 1
    assert reader.state.rows.tolist() == [[0, 0, 1]]


def test_order_across_a_boundary_is_the_same_on_any_ranks_workers_and_resumes(make_config, manifest):
    base = make_config(data={"packing": "packed"})
    config = with_phases(base, PHASES)
    first = first_steps(config, manifest, 7)
    state = first[0][-1].state.in_phase(1)
    after = first_steps(config, manifest, 12, 1, [state])
    assert after[0][0].batch.input_ids.shape == (8, 64)
    masked = [step.batch.num_masked / step.batch.num_tokens for step in after[0]]
    assert np.mean(masked) == pytest.approx(0.4, abs=0.04)
    for world_size, workers in ((2, 1), (4, 0)):
        other = with_phases(make_config(data={"packing": "packed", "workers": workers}), PHASES)
        parts = first_steps(other, manifest, 7, world_size)
        assert rows_of(parts) == rows_of(first)
        at_boundary = merged([rank[-1].state for rank in parts]).in_phase(1)
        inside = first_steps(other, manifest, 5, world_size, [at_boundary] * world_size)
        again = merged([rank[-1].state for rank in inside])
        rest = first_steps(config, manifest, 7, 1, [again])
        assert rows_of(inside) + rows_of(rest) == rows_of(after)


def test_settings_stay_until_a_later_phase_changes_them(make_config):
    config = with_phases(make_config(), [*PHASES, {"from_tokens": 5_000, "sequence_length": 128}])
    assert [config.phase_at(tokens) for tokens in (0, 2_999, 3_000, 4_999, 5_000)] == [0, 0, 1, 1, 2]
    last = config.in_phase(2)
    assert (last.data.sequence_length, last.training.batch_size, last.data.mask_rate) == (128, 8, 0.4)
    assert last.model.rotary_theta == 50_000
    assert config.in_phase(0).data == config.data
    with pytest.raises(UserError, match="one after another"):
        with_phases(make_config(), [{"from_tokens": 5}, {"from_tokens": 4}])
    with pytest.raises(UserError, match="phase 1: sequence_length = 64 is beyond model.max_positions"):
        with_phases(make_config(model={"positions": "learned", "max_positions": 32}), PHASES)


def test_weights_hold_in_the_long_run_and_each_time_to_within_one():
    weights = np.repeat([0.0, 0.3, 1.0, 2.5], 1000)
    counts = np.array([repeats_of(weights, epoch, 1, 2) for epoch in range(20)])
    assert (np.abs(counts.sum(axis=0) - 20 * weights) <= 1).all()
    assert (np.abs(counts - weights) <= 1).all()
    assert counts[0][1000:2000].mean() == pytest.approx(0.3, abs=0.05)
    assert (repeats_of(weights, 3, 1, 3) != counts[3]).any()


def test_weighted_sources_are_read_as_often_as_asked_on_any_ranks(make_config, manifest, corpus_values, tmp_path):
    raw = corpus_values["sources"][0]["path"]
    sources = [{"path": f"{raw}/00*.txt", "name": "few"}, {"path": f"{raw}/[12]*.txt", "name": "many"}]
    corpus = {**corpus_values, "path": str(tmp_path / "two"), "sources": sources, "min_train_shards": 4}
    data = {"streams": 4, "packing": "packed"}
    plain = make_config(corpus=corpus, data=data)
    two = build_corpus(plain.corpus)
    weighted = make_config(corpus=corpus, data={**data, "source_weights": {"few": 3, "many": 0.5}})
    rule = PackingRule(32, "packed", "full", (3.0, 0.5))
    source = RowSource(plain.corpus.path, two, "train", 7, [rule])
    read = Counter()
    for visit in range(2 * source.num_shards):
        shard, plan = source.open(visit)
        for sample in plan.samples[plan.starts == 0]:
            read[int(shard.sources[sample])] += 1
    documents = [s.documents for s in two.sources]
    shards = [source.open(visit)[0] for visit in range(source.num_shards)]
    in_train = [sum(int((shard.sources == number).sum()) for shard in shards) for number in (0, 1)]
    assert in_train[0] < documents[0] + 1
    assert read[0] == 6 * in_train[0]
    assert read[1] == in_train[1]
    assert rows_of(first_steps(weighted, two, 20)) == rows_of(first_steps(weighted, two, 20, 4))
    assert rows_of(first_steps(weighted, two, 20)) != rows_of(first_steps(plain, two, 20))
    wrong = make_config(corpus=corpus, data={**data, "source_weights": {"fwe": 3}})
    with pytest.raises(UserError, match="source_weights names fwe, but the sources .* are few, many"):
        list(islice(training_steps(wrong, two, StreamState.start(4), SOLE_READER), 1))


class StopAfter:
    """A stop request after some steps."""

    signal_name = "SIGTERM"

    def __init__(self, steps: float) -> None:
        self._left = steps

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0


def train_in_pieces(rank, configs, pieces):
    return [
        trainer_of(config, rank, 2, StopAfter(stop)).fit()
        for config, stops in zip(configs, pieces, strict=True)
        for stop in stops
    ]


@pytest.mark.slow
def test_a_run_resumed_inside_phases_and_at_their_boundary_continues_bit_for_bit(make_config, manifest, tmp_path):
    phases = [*PHASES, {"from_tokens": 6_000, "sequence_length": 32, "batch_size": 32, "rotary_theta": 10_000.0}]
    settings = {"training": {"tokens": 9_000, "precision": "fp32"}, "data": {"workers": 1}}
    whole, broken = (with_phases(make_config(name, **settings), phases) for name in ("whole", "broken"))
    for config in (whole, broken):
        open_run_folder(config, manifest)
    curves = []
    boundary = None
    for number, (config, stops) in enumerate(((whole, [math.inf]), (broken, [3, None, 4, math.inf]))):
        stops = [boundary - 3 if stop is None else stop for stop in stops]
        codes = run_on_ranks(train_in_pieces, 2, tmp_path / str(number), [config], [stops])
        assert codes == [[75] * (len(stops) - 1) + [0]] * 2
        records = [r for r in RunFolder(config.run_folder).metrics() if "loss" in r]
        curves.append([(r["step"], r["tokens"], r["loss"], r["grad_norm"], r["rows_checksum"]) for r in records])
        boundary = sum(tokens < 3_000 for _, tokens, *_ in curves[0]) + 1
    assert curves[0] == curves[1]
    status = (whole.run_folder / "status.json").read_text()
    assert "phase 1 at" in status
    assert "phase 2 at" in status
