"""Tables on a terminal."""

import io
import json
from pathlib import Path

from rich.console import Console
from typer.testing import CliRunner

from launch.cli import app
from launch.run_list import RunRow, runs_table
from launch.terminal.tables import fitting_table
from pretrain.run.folder import RunFolder

COLUMNS = ("context", "loss", "95 %", "gain", "95 %")
ROWS = [("1x", "3.250", "3.200 to 3.300", "+0.000", "+0.000 to +0.000")]


def console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width, color_system=None)


def printed(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def test_intervals_are_left_out_where_the_terminal_is_too_narrow_for_them():
    wide, narrow = console(80), console(50)
    for to in (wide, narrow):
        to.print(fitting_table(to, "title", COLUMNS, ROWS, dispensable="95 %"))
    assert "3.200 to 3.300" in printed(wide)
    assert "95 %" not in printed(narrow)
    assert all(cell in printed(narrow) for cell in ("1x", "3.250", "+0.000"))


def test_brackets_in_a_name_are_shown():
    to = console(120)
    to.print(runs_table([RunRow("[red]x", RunFolder(Path("x")), "lost (last seen 5 m ago)")]))
    assert "[red]x" in printed(to)
    assert "lost (last seen 5 m ago)" in printed(to)


def test_why_a_run_ended_is_one_line_however_long_it_is(tmp_path):
    why = " ".join(["node a-long-name does not see the folder"] * 12)
    (tmp_path / "blind").mkdir()
    (tmp_path / "blind" / "config.yaml").touch()
    (tmp_path / "blind" / "status.json").write_text(json.dumps({"state": "failed", "heartbeat": 1, "message": why}))
    printed_lines = CliRunner().invoke(app, ["runs", "--folder", str(tmp_path)]).stdout.splitlines()
    assert f"blind ended the last time: {why}" in printed_lines
