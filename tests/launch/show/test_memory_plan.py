"""`diptych plan`, as it is printed."""

import io
import re
from time import process_time

import pytest
from rich.console import Console

from launch.show.memory_plan import brief_plan, hardware, plan_for, show_plan
from pretrain.errors import UserError


@pytest.fixture
def show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name: str, *overrides: str, gpu: str = "h100", number: int = 1, mfu: float | None = None) -> str:
        to = Console(file=io.StringIO(), width=80, color_system=None)
        show_plan(plan_for(name, overrides, hardware(gpu, 1, number, None)), mfu, to)
        assert isinstance(to.file, io.StringIO)
        return to.file.getvalue()

    return run


BIG = ("corpus.tokenizer.vocab_size=32768", "data.sequence_length=1024", "training.batch_size=1024")


def test_fifteen_billion_parameters_are_planned_in_seconds(show):
    started = process_time()
    shown = show("model/15b", *BIG, number=64)
    assert process_time() - started < 5
    assert re.search(r"15b: 1[45]\.\d B parameters with 32,768 pieces, on 64 x H100, bf16", shown)
    assert "recommended:" in shown


def test_what_does_not_fit_is_in_brackets_and_the_configured_choice_is_judged(show):
    shown = show("model/1b", *BIG, "training.micro_batch_size=128", number=8)
    row = next(line.split() for line in shown.splitlines() if line.split()[:2] == ["optimizer", "none"])
    assert [cell.startswith("(") for cell in row[2:]] == [False] * 4 + [True] * 2
    assert re.search(r"as configured \(sharding optimizer, .*, 128 rows at once\): \d+ GiB a rank, does not fit", shown)
    assert "training.micro_batch_size=32" in shown


def test_where_nothing_fits_it_says_what_to_change(show):
    shown = show("model/1b", *BIG, gpu="8")
    assert "nothing fits: the least is" in shown
    assert re.search(r"\n  use \d+ devices\n", shown)


def test_days_follow_from_the_stated_mfu_and_the_assumption_is_called_one(show):
    assumed, given = show("model/133m", *BIG), show("model/133m", *BIG, mfu=0.2)
    assert "40% MFU, an assumption" in assumed
    assert "20% MFU as given" in given
    rates = [float(re.search(r"speed: (\d+)k tokens/s", shown).group(1)) for shown in (assumed, given)]
    assert rates[0] == pytest.approx(2 * rates[1], rel=0.01)


def test_a_processor_has_the_memory_of_this_machine_and_no_known_peak(show):
    shown = show("model/1m", gpu="cpu", number=2)
    assert "on 2 x cpu" in shown
    assert "the peak of cpu is not known; give --peak TFLOPS" in shown


def test_wrong_devices_are_answered():
    with pytest.raises(UserError, match="--gpu b300: neither one of h200, h100, a100, cpu, nor the memory"):
        hardware("b300", 1, 1, None)
    with pytest.raises(UserError, match="3 ranks cannot share data.streams = 64"):
        plan_for("model/1m", [], hardware("h100", 1, 3, None))


def test_the_brief_plan_depends_on_no_machine():
    lines = brief_plan(plan_for("model/1b", BIG, hardware("h100", 1, 8, None)))
    assert lines[0] == "1b: 1.08 B parameters with 32,768 pieces, on 8 x H100, bf16, rows of 1,024"
    assert lines[2].startswith("sharding optimizer, no block computed again, 32 rows at once: ")


def test_a_row_of_a_million_tokens_is_planned_over_eight_ranks(show):
    rows = ["data.sequence_length=1048576", "training.batch_size=8", "training.micro_batch_size=1"]
    shown = show("model/1b", *rows, "corpus.tokenizer.vocab_size=32768", "parallel.sequence=8", gpu="h100", number=8)
    note = "every row is shared by 8 ranks, 131,072 positions each; for attention a rank sends 840 GiB to the others"
    assert note in " ".join(shown.split())
    assert "training.activation_checkpointing=full training.micro_batch_size=2" in shown
