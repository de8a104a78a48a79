"""What a person sees of a training."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from launch.local import display
from launch.local.display import PlainDisplay, TerminalDisplay, make_display
from launch.terminal.console import clock
from launch.terminal.progress import StageProgress
from pretrain.run.status import Status


def status(step: int, **values: object) -> Status:
    return Status.model_validate(
        {"state": "training", "step": step, "tokens": step * 1000, "total_tokens": 1_000_000, "heartbeat": 0, **values}
    )


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=140, color_system=None)


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


MEASURED = {"loss": 4.25, "masked_accuracy": 0.312, "tokens_per_s": 20_100, "flops_per_s": 6.2e10, "seconds_left": 125}


def test_a_line_holds_every_number():
    to = console(terminal=False)
    with PlainDisplay(to) as shown:
        shown.update(status(120, **MEASURED))
    assert written(to) == (
        "step 120 | 120k of 1.00M tokens | loss 4.250 | masked accuracy 31.2% | 20.1k tokens/s | 62.0 GFLOP/s | "
        "2:05 left\n"
    )


def test_utilisation_takes_the_place_of_flops_where_it_is_known():
    assert display.numbers(status(1, **MEASURED, mfu=0.415))[-1] == "41.5% MFU"
    assert display.numbers(status(3)) == ["step 3"]


COSTS = {
    "time_shares": {"data": 0.021, "forward_backward": 0.804, "communication": 0.17, "saving": 0.0, "other": 0.0049},
    "peak_memory_bytes": 3 * 2**30,
    "planned_memory_bytes": 5 * 2**29,
}


def test_a_terminal_tells_where_the_time_goes_and_the_memory_beside_the_plan():
    to = console(terminal=True)
    with TerminalDisplay(to) as shown:
        shown.update(status(120, **MEASURED, **COSTS))
    assert "data 2% · forward+backward 80% · communication 17% · memory 3 GiB (plan 2.5)\n" in written(to)
    assert display.costs(status(3)) == []


def test_everything_fits_on_a_terminal_of_80_columns():
    to = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with TerminalDisplay(to) as shown:
        shown.update(status(123_456, **MEASURED))
    lines = [line for line in written(to).splitlines() if "step 123456" in line]
    assert lines[-1].endswith("62.0 GFLOP/s")
    assert "2:05 left" in written(to)


def test_without_a_terminal_a_long_run_prints_few_lines_and_its_last_step(monkeypatch):
    monkeypatch.setattr(display, "PLAIN_INTERVAL_S", 0.0)
    to = console(terminal=False)
    with make_display(to) as shown:
        assert isinstance(shown, PlainDisplay)
        for step in range(1000):
            shown.update(status(step, loss=None if step == 0 else 4.0))
            shown.update(status(step, loss=None if step == 0 else 4.0))
    lines = written(to).splitlines()
    assert 40 <= len(lines) <= 60
    assert lines[0].startswith("step 1 |")
    assert lines[-1].startswith("step 999 |")
    assert len(set(lines)) == len(lines)


def test_without_a_terminal_lines_come_some_seconds_apart():
    to = console(terminal=False)
    with PlainDisplay(to) as shown:
        for step in range(1, 1000):
            shown.update(status(step, loss=4.0))
    assert [line.split(" |")[0] for line in written(to).splitlines()] == ["step 1", "step 999"]


def test_on_a_terminal_there_is_a_bar_with_the_numbers_and_messages_stay():
    to = console(terminal=True)
    with make_display(to) as shown:
        assert isinstance(shown, TerminalDisplay)
        shown.update(status(500, loss=4.25))
        shown.message("checkpoint [step-00000500]")
    assert "500k of 1.00M tokens" in written(to)
    assert "loss 4.250" in written(to)
    assert "checkpoint [step-00000500]" in written(to)


def test_a_stage_is_announced_once_where_there_is_no_terminal():
    to = console(terminal=False)
    with StageProgress(to) as progress:
        for done in range(5):
            progress.report("encoding", done, 4)
    assert written(to) == "  encoding (4)\n"


def test_a_stage_of_text_tells_its_speed_and_the_time_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr(display.time, "monotonic", lambda: now)
    to = console(terminal=False)
    with StageProgress(to) as progress:
        for now in (100.0, 105.0, 120.0):
            progress.report_text("encoding", round((now - 100) * 2e6), 60_000_000, round(now - 100) * 30)
    line = "  encoding: 40.0 of 60.0 MB, 2.0 MB/s, 30 documents/s, 0:10 left"
    assert written(to) == f"  encoding (60.0 MB)\n{line}\n"


def test_a_closed_pipe_does_not_end_the_training(tmp_path):
    code = (
        "from launch.terminal.console import make_console, say\n"
        "console = make_console()\n"
        "for n in range(20_000): say(console, f'line {n}')\n"
        f"open({str(tmp_path / 'lived')!r}, 'w').close()\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=Path(display.__file__).parents[2], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    assert (tmp_path / "lived").exists()


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (125, "2:05"), (3725, "1:02:05")])
def test_times_read_like_a_clock(seconds, text):
    assert clock(seconds) == text
