"""Configs: merging, and answers to mistakes."""

import pytest
import yaml

from pretrain.config.load import config_folder, load_config, to_yaml
from pretrain.config.model import ModelConfig
from pretrain.config.topology import check_topology
from pretrain.errors import UserError


@pytest.fixture
def write(tmp_path):
    def write_config(text: str, name: str = "my run.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_config


def test_includes_come_first_then_the_file_then_overrides(write):
    write("data: {sequence_length: 64}\nmodel: {num_layers: 9, hidden_size: 64}\n", "base.yaml")
    path = write("include: [base.yaml, model/1m]\ncorpus: {path: c}\nname: x\nmodel: {num_layers: 3}\n")
    config = load_config(path, ["training.tokens=5000", "optimizer.betas=[0.8,0.9]"])
    assert (config.data.sequence_length, config.model.num_layers, config.model.hidden_size) == (64, 3, 128)
    assert (config.training.tokens, config.optimizer.betas) == (5000, (0.8, 0.9))
    assert config.corpus.path.is_absolute()


def test_on_and_off_are_words_also_where_yaml_reads_booleans(write):
    path = write("corpus: {path: c}\nname: x\ntraining: {spikes: off, compile: on}\n")
    assert load_config(path, []).training.compile == "on"
    training = load_config(path, ["training.compile=off"]).training
    assert (training.compile, training.spikes) == ("off", "off")


@pytest.mark.parametrize("name", sorted(p.stem for p in config_folder().glob("*.yaml")))
def test_every_complete_config_is_valid_and_survives_being_written_out(name, write):
    config = load_config(name)
    assert config.name == name
    assert load_config(write(to_yaml(config))) == config


@pytest.mark.parametrize("path", sorted((config_folder() / "model").glob("*[0-9][mb].yaml")), ids=lambda p: p.stem)
def test_every_model_size_has_the_parameters_that_its_name_says(path):
    model = ModelConfig(**yaml.safe_load(path.read_text())["model"])
    vocab_size = {"1m": 2048, "4m": 4096, "15m": 4096}.get(path.stem, 32_768)
    h = model.hidden_size
    parameters = vocab_size * h + model.num_layers * (4 * h * h + 3 * h * model.ffn_size + 2 * h) + h
    unit = {"m": 1e6, "b": 1e9}[path.stem[-1]]
    assert parameters == pytest.approx(float(path.stem[:-1]) * unit, rel=0.28)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("trainin.tokens=5", r"trainin: unknown key .* did you mean training\?"),
        ("model.hiden_size=5", r"model.hiden_size: unknown key \(value 5\); did you mean model.hidden_size\?"),
        ("num_layers=5", r"num_layers: unknown key .* did you mean model.num_layers\?"),
        ("training.sharding=ful", r"training.sharding: 'ful' is not allowed; allowed: 'none', .*; nearest: full"),
        ("training.tokens=many", r"training.tokens: .*valid integer.*given: 'many'"),
        ("data.mask_rate=1.5", r"data.mask_rate: .*less than 1"),
        ("model.num_heads=3", r"model: num_heads = 3 does not divide hidden_size = 128"),
        ("model.num_heads=128", r"a head of width 1 cannot be split"),
        ("model.num_heads=64", r"rotary positions rotate pairs, but a sub-head is 1 wide"),
        ("schedule.warmup=0.9", r"schedule: warmup \+ decay = 1.2 is more"),
        ("corpus.splits.valid=0.99", r"corpus.splits: valid \+ test"),
        ("corpus.sources.0.formt=text", r"corpus.sources.0.formt: unknown key .* did you mean corpus.sources.0.format"),
        ("name=../x", r"name: '../x' cannot name a folder; use up to 100 letters"),
        ("tokens", r"'tokens' is not KEY=VALUE"),
    ],
)
def test_a_mistake_is_answered_with_its_path_and_what_is_allowed(write, override, answer):
    path = write("corpus: {path: c, sources: [{path: x.txt}]}\nname: n\ndata: {streams: 16}\n")
    with pytest.raises(UserError, match=answer):
        load_config(path, [override])


def test_impossible_combinations_are_refused_before_anything_starts(write):
    path = write("corpus: {path: c, sources: [{path: x}], min_train_shards: 8}\nname: n\ndata: {streams: 8}\n")
    with pytest.raises(UserError, match="beyond model.max_positions = 64"):
        load_config(path, ["model.positions=learned", "model.max_positions=64"])
    with pytest.raises(UserError, match="data.streams = 16 need a shard each"):
        load_config(path, ["data.streams=16"])
    check_topology(load_config(path), 4)
    with pytest.raises(UserError, match=r"3 ranks cannot share .* use one of 1, 2, 4, 8 ranks"):
        check_topology(load_config(path), 3)


def test_hybrid_is_for_several_nodes_with_as_many_ranks_each(write):
    path = write("corpus: {path: c}\nname: n\ntraining: {sharding: hybrid}\n")
    check_topology(load_config(path), 8, 4)
    for ranks, per_node in ((4, None), (4, 4), (4, 1), (8, 3)):
        with pytest.raises(UserError, match=rf"several nodes .* not for {ranks} ranks, {per_node or ranks} to a node"):
            check_topology(load_config(path), ranks, per_node)


def test_rows_are_shared_by_numbers_of_ranks_that_divide_heads_rows_and_ranks(write):
    path = write("corpus: {path: c}\nname: n\ndata: {streams: 8}\nmodel: {hidden_size: 144, num_heads: 6}\n")
    with pytest.raises(UserError, match=r"parallel.sequence = 4 .* model.num_heads = 6 .* use one of 1, 2, 3, 6, or"):
        load_config(path, ["parallel.sequence=4"])
    with pytest.raises(UserError, match=r"parallel.sequence = 3 ranks cannot share rows of 128 .* instance 126 or 129"):
        load_config(path, ["parallel.sequence=3"])
    phases = "phases=[{from_tokens: 5, sequence_length: 63}]"
    with pytest.raises(UserError, match="cannot share rows of 63 positions"):
        load_config(path, ["parallel.sequence=2", phases])
    shared = load_config(path, ["parallel.sequence=2"])
    check_topology(shared, 16)
    for ranks in (1, 3, 32):
        with pytest.raises(UserError, match=rf"{ranks} rank.* groups of parallel.sequence = 2.* 2, 4, 8, 16 ranks"):
            check_topology(shared, ranks)


def test_unreadable_files_and_unknown_names_say_what_there_is(write):
    with pytest.raises(UserError, match=r"no config 'quickstar'.*did you mean quickstart\?"):
        load_config("quickstar")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_config(write("a: [1,\n"))
    with pytest.raises(UserError, match="expected `key: value` lines"):
        load_config(write("- a\n"))
    with pytest.raises(UserError, match="includes itself"):
        load_config(write("include: [loop.yaml]\n", "loop.yaml"))
    with pytest.raises(UserError, match="corpus: required"):
        load_config(write("seed: 1\n", "plain.yaml"))
