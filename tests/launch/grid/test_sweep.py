"""Grids of runs: what their members are, and what their results come to."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from launch.grid import execution
from launch.grid.execution import run_here
from launch.grid.members import axes_of, is_axis, members_of, plan_sweep, read_members, split_values
from launch.grid.sweep_report import plot_curves, read_results, results_table, spread
from launch.run_list import list_runs
from pretrain.config.load import load_config, validate
from pretrain.errors import UserError


def config_with(axes: dict):
    return validate({"name": "x", "corpus": {"path": "/c"}, "sweep": axes}, "test")


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"runs: {tmp_path}/runs\ncorpus: {{path: {tmp_path}/corpus}}\n"
        "sweep: {positions: {none: {model.positions: none}, dropped: {model.drop_positions_after: 700}}}\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("text", "values"),
    [("a", ["a"]), ("a,b", ["a", "b"]), ("[1,2],[3]", ["[1,2]", "[3]"]), ("{a: 1, b: 2}", ["{a: 1, b: 2}"])],
)
def test_commas_inside_brackets_separate_nothing(text, values):
    assert split_values(text) == values
    assert is_axis(f"k={text}") == (len(values) > 1)


def test_members_are_all_combinations_with_names_that_tell_them_apart():
    axes = axes_of(config_with({}), ["model.attention=dual_triangle,causal", "data.mask_rate=0.1,0.2", "seed=1,2"])
    members = members_of(axes)
    assert len({member.name for member in members}) == len(members) == 8
    assert members[1].name == "dual_triangle-mask_rate0.1-seed2"
    assert members[1].overrides == ["model.attention=dual_triangle", "data.mask_rate=0.1", "seed=2"]
    assert members[1].labels == {"model.attention": "dual_triangle", "data.mask_rate": "0.1", "seed": "2"}


def test_bare_numbers_are_names_of_groups_too():
    axes = axes_of(config_with({"width": {64: {"model.hidden_size": 64}, 0.5: {"seed": 2}}}), [])
    assert [member.name for member in members_of(axes)] == ["width64", "width0.5"]


def test_a_config_can_name_groups_of_settings_as_an_axis_and_the_command_line_adds_to_it(write, tmp_path):
    planned = plan_sweep(write, ["name=s"], ["seed=1,2"])
    assert [member.name for member in planned.members] == ["none-seed1", "none-seed2", "dropped-seed1", "dropped-seed2"]
    first, last = planned.configs[0], planned.configs[-1]
    assert (first.model.positions, first.seed, first.sweep) == ("none", 1, {})
    assert (last.model.positions, last.model.drop_positions_after, last.seed) == ("rotary", 700, 2)
    assert last.run_folder == tmp_path / "runs" / "s" / "dropped-seed2"
    planned.write()
    assert [member.name for member in read_members(planned.folder)] == [m.name for m in planned.members]
    # A sweep that is extended keeps what it had.
    plan_sweep(write, ["name=s"], ["seed=2,3"]).write()
    assert len(read_members(planned.folder)) == 6


def test_no_axes_and_a_wrong_member_are_answers(write):
    with pytest.raises(UserError, match="no axes: give some, for instance --grid seed=1,2,3"):
        axes_of(config_with({}), [])
    with pytest.raises(UserError, match="is not an axis KEY=VALUE,VALUE"):
        axes_of(config_with({}), ["seed"])
    with pytest.raises(UserError, match=r"model.attention: 'sideways' is not allowed"):
        plan_sweep(write, [], ["model.attention=causal,sideways"])
    with pytest.raises(UserError, match="is no sweep"):
        read_members(Path("/nowhere"))


def test_here_a_failed_member_does_not_stop_the_rest_and_a_second_time_only_that_one_is_trained(write, monkeypatch):
    planned = plan_sweep(write, [], [])
    trained, failing = [], {"none"}

    def train_member(config, *_: object) -> int:
        trained.append(config.name)
        if config.name in failing:
            raise UserError("no good")
        folder = config.run_folder
        for part in ("checkpoints/step-00000001", "evaluation/context"):
            (folder / part).mkdir(parents=True)
        (folder / "evaluation/context/report.json").write_text("{}")
        status = {"state": "done", "tokens": 10**9, "checkpoint": "step-00000001", "heartbeat": 1}
        (folder / "status.json").write_text(json.dumps(status))
        return 0

    monkeypatch.setattr(execution, "train_and_evaluate", train_member)
    assert run_here(planned, 1, Console()) == 1
    assert trained == ["none", "dropped"]
    failing.clear()
    assert run_here(planned, 1, Console()) == 0
    assert trained == ["none", "dropped", "none"]


def test_an_interrupted_member_interrupts_the_sweep(write, monkeypatch):
    monkeypatch.setattr(execution, "train_and_evaluate", lambda *_: 75)
    planned = plan_sweep(write, [], [])
    assert run_here(planned, 1, Console()) == 75


def finished(folder: Path, losses: list[float], contexts: dict[int, float]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: x\n")
    lines = [json.dumps({"step": n, "tokens": 100 * n, "validation_loss": loss}) for n, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "status.json").write_text(json.dumps({"state": "done", "heartbeat": 1}))
    (folder / "evaluation" / "context").mkdir(parents=True)
    results = [{"length": length, "loss": loss} for length, loss in contexts.items()]
    (folder / "evaluation" / "context" / "report.json").write_text(json.dumps({"results": results}))


def test_results_are_averaged_over_seeds_and_drawn(write):
    planned = plan_sweep(write, ["name=s"], ["seed=1,2"])
    planned.write()
    finished(planned.folder / "none-seed1", [5.0, 3.0], {128: 2.0, 256: 4.0})
    finished(planned.folder / "none-seed2", [5.0, 4.0], {128: 3.0, 256: 4.0})
    results = read_results(planned.folder, 0)
    table = results_table("s", results)
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(table)
    text = console.export_text()
    rows = {line.split()[0]: line for line in text.splitlines() if line.split()[:1] in (["none"], ["dropped"])}
    assert "2 of 2" in rows["none"]
    assert [part in rows["none"] for part in ("3.500 ± 0.707", "2.500 ± 0.707", "4.000 ± 0.000")] == [True] * 3
    assert "0 of 2" in rows["dropped"]
    assert plot_curves(planned.folder, results).stat().st_size > 5_000
    assert [row.name for row in list_runs(planned.folder.parent)] == ["s/none-seed1", "s/none-seed2"]


@pytest.mark.parametrize(("values", "text"), [([], "-"), ([1.0], "1.000"), ([1.0, 3.0], "2.000 ± 1.414")])
def test_a_spread_says_no_more_than_is_known(values, text):
    assert spread(values) == text


@pytest.mark.parametrize("name", ["paper/text", "paper/protein", "paper/text-small", "paper/protein-small"])
def test_the_papers_experiments_are_18_valid_runs(name, tmp_path):
    base = load_config(name, [f"runs={tmp_path}"])
    planned = plan_sweep(name, [f"runs={tmp_path}"], [])
    assert len(planned.members) == 18
    kinds = {(c.model.attention, c.model.positions, bool(c.model.drop_positions_after)) for c in planned.configs}
    assert len(kinds) == 6
    dropped = [c for c in planned.configs if c.model.drop_positions_after]
    assert {c.model.drop_positions_after for c in dropped} == {round(0.7 * base.training.tokens)}
    assert {c.seed for c in planned.configs} == {1, 2, 3}
    longest = {max(c.evaluation.lengths) * c.data.sequence_length for c in planned.configs}
    if not name.endswith("small"):
        assert (base.model.num_layers, base.model.hidden_size, base.data.sequence_length) == (12, 768, 256)
        assert base.training.tokens == 1_000_000_000
        assert longest == {1024}
