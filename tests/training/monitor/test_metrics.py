"""What a line of metrics.jsonl holds."""

import json
import math

import pytest
import torch

from pretrain.model.summary import GROUPS
from pretrain.run.folder import RunFolder
from pretrain.training.cost.flops import FlopsPerToken
from pretrain.training.monitor.clock import Timing
from pretrain.training.monitor.metrics import Metrics, Usage
from pretrain.training.step_record import StepOutcome, StepRecord, StepTotals


@pytest.fixture
def metrics(tmp_path):
    """Of 1,000 FLOPs a token and 500 a masked one, on a device of 8 MFLOP/s."""
    made = Metrics(RunFolder(tmp_path), 0, FlopsPerToken(900, 100, 600, 500), 8e6, 0)
    yield made
    made.close()


def record(step, skipped=None, squares=None):
    totals = StepTotals(masked=200, tokens=1000, rows_checksum=7, samples_lost=0, stop=False)
    sums = torch.tensor([600.0, 50.0])
    return StepRecord(step, step * 1000, totals, 1e-3, StepOutcome(sums, 0.5, skipped=skipped), 0.25, squares)


def usage(memory=300):
    return Usage(Timing(2.0, (0.2, 0.6, 0.6, 0.2, 0.1, 0.1, 0.1)), memory)


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_the_last_step_of_an_interval_tells_what_all_of_them_cost(metrics, tmp_path):
    squares = torch.zeros(3, len(GROUPS), dtype=torch.float64)
    squares[:, 0] = torch.tensor([9.0, 4.0, 0.0004])
    squares[:, 1] = torch.tensor([16.0, 1.0, 0.0001])
    metrics.planned_memory = 400
    metrics.add(record(1))
    metrics.add(record(2, squares=squares))
    written = metrics.flush(usage())
    assert written == lines(tmp_path)
    first, last = written
    assert set(last) - set(first) == {
        *("tokens_per_s", "masked_tokens_per_s", "flops_per_s", "mfu", "mfu_triangles_as_full", "time_shares"),
        *("peak_memory_bytes", "planned_memory_bytes", "grad_norms", "update_ratios"),
    }
    assert (last["tokens_per_s"], last["masked_tokens_per_s"]) == (4000, 800)
    assert (last["mfu"], last["mfu_triangles_as_full"]) == (0.55, 0.8)
    assert (last["peak_memory_bytes"], last["planned_memory_bytes"]) == (300, 400)
    assert last["time_shares"]["forward_backward"] == 0.6
    assert sum(last["time_shares"].values()) == pytest.approx(1)
    assert last["grad_norms"] == {"embedding": 3, "attention": 4}
    assert last["update_ratios"] == pytest.approx({"embedding": 0.01, "attention": 0.01})
    assert math.isclose(first["loss"], 3.0)


def test_what_is_not_known_is_left_out(metrics, tmp_path):
    metrics.add(record(1, squares=torch.ones(3, len(GROUPS), dtype=torch.float64), skipped="its loss is a spike"))
    metrics.flush(usage(memory=None))
    (line,) = lines(tmp_path)
    assert not {"grad_norms", "update_ratios", "peak_memory_bytes", "planned_memory_bytes", "slowest_rank"} & set(line)
    assert line["skipped"] == "its loss is a spike"
