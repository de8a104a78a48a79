"""The argmax probe: its task, its proof, its files."""

import functools
import json
import math
import subprocess
import sys

import pytest
import torch

from launch.cli import main
from pretrain.config.model import ModelConfig
from pretrain.errors import UserError
from pretrain.evaluation.probes import argmax
from pretrain.evaluation.probes.argmax import (
    CHANCE,
    LENGTH,
    VALUES,
    ArgmaxCell,
    ArgmaxResult,
    ArgmaxSettings,
    PositionProbe,
    accuracy_table,
    draw_sequences,
    kind_accuracies,
    probe_layout,
    run_argmax,
    train_argmax,
)
from pretrain.evaluation.report.markdown import markdown_table

TINY = ArgmaxSettings(steps=4, batch_size=4, held_out=16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------- the task


def test_the_answer_is_the_index_of_the_one_largest_value():
    values, answer = draw_sequences(3000, generator())
    assert values.shape == (3000, LENGTH)
    for row, index in zip(values[:200].tolist(), answer[:200].tolist(), strict=True):
        assert [i for i, value in enumerate(row) if value == max(row)] == [index]
    largest = values.amax(dim=1, keepdim=True)
    assert ((values == largest).sum(dim=1) == 1).all()


def test_answers_are_uniform_over_the_indices_and_values_use_the_whole_range():
    num = 64_000
    values, answer = draw_sequences(num, generator(3))
    counts = torch.bincount(answer, minlength=LENGTH).double()
    expected = num / LENGTH
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    # 63 degrees of freedom: mean 63, standard deviation 11.2.
    assert chi_squared < 63 + 4 * 11.2
    assert values.min() == 0
    assert values.max() == VALUES - 1
    assert float(values.double().mean()) == pytest.approx((VALUES - 1) / 2, abs=0.5)


def test_a_seed_decides_the_sequences():
    first, again, other = (draw_sequences(8, generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --------------------------------------------------------------------------------------------------------- the proof


def scores_before_and_after_a_permutation(attention: str, positions: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    model = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, attention=attention, positions=positions)
    probe = PositionProbe(model).double()
    values, _ = draw_sequences(6, generator())
    shuffled = values[:, torch.randperm(LENGTH, generator=generator(1))]
    return probe(values, probe_layout(6)), probe(shuffled, probe_layout(6))


def test_a_bidirectional_encoder_without_positions_cannot_tell_an_order():
    before, after = scores_before_and_after_a_permutation("bidirectional", "none")
    torch.testing.assert_close(after, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("attention", "positions"),
    [("dual_triangle", "none"), ("causal", "none"), ("bidirectional", "rotary"), ("bidirectional", "learned")],
)
def test_every_other_kind_can(attention, positions):
    before, after = scores_before_and_after_a_permutation(attention, positions)
    assert float((after - before).detach().abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------------ training and files


def test_a_cell_is_the_same_each_time_whatever_was_drawn_before():
    cell = ArgmaxCell("dual_triangle", "none", 3)
    first = train_argmax(cell, TINY)
    torch.randn(7)
    threads = torch.get_num_threads()
    second = train_argmax(cell, TINY)
    assert (first.accuracy, first.loss, first.curve) == (second.accuracy, second.loss, second.curve)
    assert first.loss != train_argmax(ArgmaxCell("dual_triangle", "none", 4), TINY).loss
    assert [step for step, _ in first.curve] == [1, 2, 3, 4]
    assert first.loss == pytest.approx(math.log(LENGTH), abs=0.6)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("seed", [0, 3])
def test_held_out_sequences_are_no_sequences_of_the_training(seed, monkeypatch):
    drawn = []

    def record(num, generator):
        values, answer = draw_sequences(num, generator)
        drawn.append(values)
        return values, answer

    monkeypatch.setattr(argmax, "draw_sequences", record)
    train_argmax(ArgmaxCell("causal", "none", seed), TINY)
    *training, held_out = drawn
    assert (len(torch.cat(training)), len(held_out)) == (TINY.steps * TINY.batch_size, TINY.held_out)
    assert not set(map(tuple, torch.cat(training).tolist())) & set(map(tuple, held_out.tolist()))


def test_kinds_are_means_over_seeds_beside_chance():
    accuracies = [0.5, 0.75, CHANCE]
    cells = [ArgmaxCell("causal", "none", 0), ArgmaxCell("causal", "none", 1), ArgmaxCell("bidirectional", "none", 0)]
    results = [ArgmaxResult(c, TINY, a, 1.0, [(1, a)], 1.0) for c, a in zip(cells, accuracies, strict=True)]
    causal, bidirectional = kind_accuracies(results)
    assert (causal.mean, causal.lowest, causal.highest, causal.seeds) == (0.625, 0.5, 0.75, 2)
    assert bidirectional.mean == CHANCE
    assert "| causal | none | 62.5% | 50.0% to 75.0% | 40.0 | 2 |" in markdown_table(
        accuracy_table([causal, bidirectional])
    )
    assert "| chance |  | 1.6% |" in markdown_table(accuracy_table([causal]))


def test_finished_cells_are_not_trained_again(tmp_path, monkeypatch):
    trained = []
    real = argmax.train_argmax

    def record(cell, settings):
        trained.append(cell.name)
        return real(cell, settings)

    monkeypatch.setattr(argmax, "train_argmax", record)
    first = run_argmax(tmp_path, ["causal"], ["none"], [0, 1], TINY)
    assert trained == ["causal-none-0", "causal-none-1"]
    before = (tmp_path / "results.json").read_text()
    assert run_argmax(tmp_path, ["causal"], ["none"], [0, 1], TINY) == first
    assert len(trained) == 2
    assert (tmp_path / "results.json").read_text() == before
    (tmp_path / "cells" / "causal-none-0.json").unlink()
    run_argmax(tmp_path, ["causal"], ["none"], [0, 1, 2], TINY)
    assert trained[2:] == ["causal-none-0", "causal-none-2"]


def test_cells_of_other_settings_are_not_mixed_in(tmp_path):
    run_argmax(tmp_path, ["causal"], ["none"], [0], TINY)
    with pytest.raises(UserError, match=r"other settings \(steps=4\); choose another folder with --out"):
        run_argmax(tmp_path, ["causal"], ["none"], [0], ArgmaxSettings(steps=5, batch_size=4, held_out=16))
    path = tmp_path / "cells" / "causal-none-0.json"
    cell = json.loads(path.read_text())
    del cell["settings"]["held_out_seed"]
    path.write_text(json.dumps(cell))
    with pytest.raises(UserError, match=r"other settings \(held_out_seed=None\)"):
        run_argmax(tmp_path, ["causal"], ["none"], [0], TINY)


def test_the_command_writes_its_files_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.probe.num_cores", lambda: 1)
    monkeypatch.setattr("launch.probe.ArgmaxSettings", functools.partial(ArgmaxSettings, batch_size=4, held_out=16))
    command = ["diptych", "evaluate", "probe", "argmax", "--steps", "2", "--seeds", "1", "--out", "here"]
    monkeypatch.setattr(sys, "argv", [*command, "--attention", "dual_triangle", "--attention", "bidirectional"])
    shown = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        shown.append(capsys.readouterr().out)
    assert "dual-triangle   none" in shown[1]
    results = json.loads((tmp_path / "here" / "results.json").read_text())
    assert [cell["cell"] for cell in results["cells"]] == [
        {"attention": attention, "positions": positions, "seed": 0}
        for attention in ("dual_triangle", "bidirectional")
        for positions in ("none", "rotary")
    ]
    assert results["settings"]["steps"] == 2
    assert len(list((tmp_path / "here" / "cells").iterdir())) == 4
    assert (tmp_path / "here" / "table.md").read_text().count("\n") == 2 + 4 + 1
    assert (tmp_path / "here" / "accuracy.png").stat().st_size > 5_000


def test_an_unknown_kind_is_wrong_input(tmp_path):
    arguments = ["evaluate", "probe", "argmax", "--attention", "diagonal"]
    command = [sys.executable, "-m", "launch.cli", *arguments]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 2


@pytest.mark.slow
def test_dual_triangles_learn_positions_that_a_bidirectional_encoder_cannot(tmp_path):
    kinds = run_argmax(
        tmp_path, ["dual_triangle", "bidirectional"], ["none"], [0], ArgmaxSettings(steps=700), processes=2
    )
    dual, bidirectional = (kind.mean for kind in kinds)
    assert dual > 12 * CHANCE
    # Four standard deviations of a guess on 2,048 sequences.
    assert abs(bidirectional - CHANCE) < 4 * math.sqrt(CHANCE * (1 - CHANCE) / 2048)
