"""The benchmarks run, at sizes that say nothing, and their verdicts are right."""

import functools
import json
import sys

import pytest
import torch

from benchmarks import attention
from benchmarks.timing import Row, compare, paired

TINY = {
    "heads": 2,
    "width": 8,
    "lengths": (64, 128),
    "target_length": 64,
    "flex_length": 128,
    "window": 16,
    "window_length": 64,
    "linear_length": 256,
    "packed_length": 96,
    "packed_documents": 4,
    "step_rows": 2,
    "step_length": 16,
    "step_hidden": 32,
}


def test_variants_are_timed_in_turn_and_in_both_orders():
    order = []
    seconds = paired({name: lambda name=name: order.append(name) for name in "abc"}, 2, min_sample_s=0)
    assert "".join(order) == "aabbcc" + "abc" + "cba"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_ratio_is_the_median_of_the_rounds_and_decides_the_verdict():
    at_most = compare(Row("x", "a", "b", "time", "at most", 0.65), [1.0, 2.0, 9.0], [2.0, 4.0, 10.0])
    assert (at_most.ratio, at_most.lowest, at_most.highest, at_most.verdict) == (0.5, 0.5, 0.9, "met")
    assert (at_most.subject_value, at_most.reference_value) == (2000, 4000)
    at_least = compare(Row("x", "a", "b", "speed", "at least", 2.5), [1.0, 2.0], [2.0, 4.0], speedup=True)
    assert (at_least.ratio, at_least.verdict) == (2.0, "not met")
    assert compare(Row("x", "a", "b", "time"), [1.0], [2.0]).verdict == "-"
    assert Row("x", "a", "b", "time", "at most", 1.0, unmeasured="no GPU here").verdict == "unmeasured"


@pytest.fixture
def plain_flex(monkeypatch):
    """flex_attention without its compiler, which alone takes longer than everything else here."""
    monkeypatch.setattr(attention.torch, "compile", lambda function, **_: function)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_row_of_the_attention_benchmark_is_in_its_results(plain_flex, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "new folder"
    monkeypatch.setattr(attention, "Sizes", functools.partial(attention.Sizes, **TINY))
    monkeypatch.setattr(sys, "argv", ["attention.py", "--only", "cpu", "--rounds", "1", "--out", str(folder)])
    threads = torch.get_num_threads()
    attention.main()
    torch.set_num_threads(threads)
    saved = json.loads((folder / "attention-cpu.json").read_text())
    named = {(row["name"], row["subject"], row["reference"]): row for row in saved["rows"]}
    for length in (64, 128):
        for reading in ("1 heads of 16 = 2 sub-heads of 8", "2 heads of 8 = 4 sub-heads of 4"):
            for subject in (f"dual-triangle, {reading}", f"windowed, W=16, {reading}", "causal"):
                row = named[f"cpu, forward+backward, L={length}", subject, "bidirectional, 2 heads of 8"]
                assert row["ratio"] > 0
    targets = [(row["sense"], row["target"]) for row in saved["rows"] if row["target"] and row["ratio"]]
    assert sorted(targets) == [
        ("at least", 2.5),
        ("at least", 2.5),
        ("at most", 0.02),
        ("at most", 0.15),
        ("at most", 0.15),
        ("at most", 0.65),
        ("at most", 0.65),
        ("at most", 1.0),
        ("at most", 1.25),
        ("at most", 1.25),
    ]
    cuda = [row for row in saved["rows"] if row["name"].startswith("cuda")]
    assert len(cuda) == 2 * 3 * 3
    assert {row["verdict"] for row in cuda} == {"unmeasured"}
    assert {row["target"] for row in cuda} == {1.6, 1.3, 1.0}
    text = (folder / "attention-cpu.md").read_text()
    assert text.count("\n| cpu") + text.count("\n| cuda") == len(saved["rows"])
    assert text in capsys.readouterr().out
    assert text.count("unmeasured: no GPU here") == len(cuda)
    assert {"cpu", "cores", "threads", "torch", "date"} <= saved["machine"].keys()
    assert (folder / "attention-cpu.png").stat().st_size > 5_000
