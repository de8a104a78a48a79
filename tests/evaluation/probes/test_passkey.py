"""The passkey probe: its rows, its encoders, what it counts, its files."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from launch.cli import main
from pretrain.batch import IGNORED
from pretrain.data.tokenizer import BOS, EOS, MASK
from pretrain.errors import UserError
from pretrain.evaluation.context.tasks import KEY, SPAN
from pretrain.evaluation.probes import passkey_grid
from pretrain.evaluation.probes.passkey import (
    Found,
    PasskeyCell,
    PasskeyResult,
    PasskeySettings,
    draw_training_rows,
    measure,
    model_config,
    passkey_vocabulary,
    row_length,
    train_passkey,
)
from pretrain.evaluation.probes.passkey_grid import PASSKEY_CHANCE, passkey_table, run_passkey, share_found
from pretrain.model.encoder import MaskedLanguageModel

TINY = PasskeySettings(steps=2, tokens=64, row_lengths=(32,), factors=(1, 2), samples=1, hidden_size=16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("length", "pairs"), [(32, 1), (48, 2), (64, 3), (128, 6)])
def test_every_masked_key_stands_in_the_row_after_its_marker(length, pairs):
    keys = passkey_vocabulary(TINY)
    inputs, targets = draw_training_rows(50, length, keys, generator())
    assert inputs.shape == targets.shape == (50, length)
    assert (inputs[:, 0] == BOS).all()
    assert (inputs[:, -1] == EOS).all()
    assert torch.equal(inputs == MASK, targets != IGNORED)
    assert ((inputs == MASK).sum(dim=1) == pairs * KEY).all()
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        questions = [i for i in range(length) if row[i] == MASK and row[i - 1] != MASK]
        assert len(questions) == pairs
        for begin in questions:
            key = wanted[begin : begin + KEY]
            assert set(key) <= set(keys.candidates.tolist())
            whole = [*row[begin - (SPAN - KEY) : begin], *key]
            assert any(row[i : i + SPAN] == whole for i in range(1, length - SPAN))


def test_keys_lie_on_both_sides_of_their_questions_at_every_distance():
    length = 64
    inputs, targets = draw_training_rows(600, length, passkey_vocabulary(TINY), generator())
    ahead = []
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        for begin in (i for i in range(length) if row[i] == MASK and row[i - 1] != MASK):
            whole = [*row[begin - (SPAN - KEY) : begin], *wanted[begin : begin + KEY]]
            at = next(i for i in range(length - SPAN) if row[i : i + SPAN] == whole)
            ahead.append(at - (begin - (SPAN - KEY)))
    assert 0.45 < np.mean(np.array(ahead) > 0) < 0.55
    assert set(range(SPAN, 49)) <= {abs(a) for a in ahead}


def test_longer_rows_come_in_one_after_another_and_none_is_beyond_the_training_length():
    settings = PasskeySettings(steps=100)
    lengths = [row_length(step, settings, generator(step)) for step in range(1, 101)]
    assert set(lengths[:9]) == {32}
    assert max(lengths[:19]) <= 48
    assert set(lengths[50:]) == {32, 48, 64, 96, 128}


def test_the_pattern_is_all_that_kinds_differ_in():
    local, rotary, none = (
        model_config("dual_triangle", p, PasskeySettings()) for p in ("local_global", "rotary", "none")
    )
    assert [(layer.span, layer.positions) for layer in local.resolved_layers] == [(16, "rotary"), ("global", "none")]
    assert {(layer.span, layer.positions) for layer in rotary.resolved_layers} == {("global", "rotary")}
    assert {(layer.span, layer.positions) for layer in none.resolved_layers} == {("global", "none")}
    shapes = [[p.shape for p in MaskedLanguageModel(config, 69).parameters()] for config in (local, rotary, none)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_what_is_counted_is_right_tokens_and_whole_keys():
    """An encoder that always says the same candidate: one in ten of the tokens, and no key but by luck."""
    settings = dataclasses.replace(TINY, samples=8)
    model = MaskedLanguageModel(model_config("causal", "none", settings), settings.vocab_size)
    said = int(passkey_vocabulary(settings).candidates[3])
    model.head.weight = torch.nn.Parameter(torch.zeros(settings.vocab_size, settings.hidden_size))
    model.encoder.norm.register_forward_hook(lambda *arguments: torch.ones_like(arguments[2]))
    model.head.weight.data[said] = 1
    found = [f for f in measure(model, 0, settings) if f.reading == "plain"]
    rows, tokens = sum(f.rows for f in found), sum(f.tokens for f in found)
    assert {f.factor for f in found} == {1, 2}
    assert tokens == sum(f.tokens_among_candidates for f in found)
    assert 0.04 < tokens / (KEY * rows) < 0.16
    assert sum(f.keys for f in found) <= 1
    model.head.weight.data[MASK] = 2  # now the most likely id of all is no candidate, and among these nothing changes
    found = [f for f in measure(model, 0, settings) if f.reading == "plain"]
    assert sum(f.tokens for f in found) == 0
    assert sum(f.tokens_among_candidates for f in found) == tokens


def result(seed: int, keys: int) -> PasskeyResult:
    found = [Found(r, f, 8, 10, keys if f == 1 else 0, 30, 35) for r in ("plain", "log_length") for f in (1, 2)]
    return PasskeyResult(PasskeyCell("dual_triangle", "local_global", seed), TINY, found, [(1, 0.5)], 1.0)


def test_tables_give_shares_over_the_seeds_beside_chance():
    results = [result(0, 9), result(1, 10)]
    assert share_found(results, "keys", "plain", 1) == [0.9, 1.0]
    assert share_found(results, "tokens", "log_length", 2) == [0.75, 0.75]
    first, _, chance = passkey_table(results, "keys").rows
    assert first == ("dual-triangle", "local-global", "as trained", "95.0 (90 to 100)", "0.0 (0 to 0)", "2")
    assert chance[3:5] == ("0.01", "0.01")
    assert PASSKEY_CHANCE["keys"] == pytest.approx(1e-4)


def test_a_cell_is_the_same_each_time_and_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(passkey_grid, "write_results", lambda *_: None)
    first = run_passkey(tmp_path, [("dual_triangle", "local_global")], [0], TINY)
    torch.randn(7)
    again = train_passkey(PasskeyCell("dual_triangle", "local_global", 0), TINY)
    assert (again.found, again.curve) == (first[0].found, first[0].curve)
    monkeypatch.setattr(passkey_grid, "train_passkey", lambda *_: pytest.fail("trained again"))
    assert run_passkey(tmp_path, [("dual_triangle", "local_global")], [0], TINY) == first
    with pytest.raises(UserError, match=r"other settings \(steps=2\)"):
        run_passkey(tmp_path, [("dual_triangle", "local_global")], [0], dataclasses.replace(TINY, steps=3))


def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys):
    tiny = dataclasses.asdict(dataclasses.replace(TINY, factors=(1,)))
    monkeypatch.setattr("launch.probe.PasskeySettings", lambda steps: PasskeySettings(**{**tiny, "steps": steps}))
    command = ["diptych", "evaluate", "probe", "passkey", "--attention", "causal", "--pattern", "none", "--pattern"]
    monkeypatch.setattr(sys, "argv", [*command, "rotary", "--steps", "1", "--seeds", "1", "--out", str(tmp_path)])
    monkeypatch.setattr("launch.probe.num_cores", lambda: 1)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    assert "no positions" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    kinds = [{"attention": "causal", "pattern": pattern, "seed": 0} for pattern in ("none", "rotary")]
    assert [cell["cell"] for cell in results["cells"]] == kinds
    assert results["settings"]["steps"] == 1
    assert (tmp_path / "table.md").read_text().count("| chance |") == 3
    assert (tmp_path / "accuracy.png").stat().st_size > 5_000


@pytest.mark.slow
def test_a_local_and_a_global_layer_learn_to_find_keys():
    """To say any candidate of the row would be right in about a quarter of the tokens."""
    settings = PasskeySettings(steps=400, row_lengths=(32,), tokens=1024, factors=(1, 2), samples=10)
    cell = train_passkey(PasskeyCell("dual_triangle", "local_global", 0), settings)
    for factor in settings.factors:
        [tokens] = share_found([cell], "tokens", "plain", factor)
        assert tokens > 4 * PASSKEY_CHANCE["tokens"]
