"""`diptych evaluate probe`: synthetic probes with progress, and their tables on a terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.local.ranks import num_cores
from launch.terminal.console import say
from launch.terminal.progress import StageProgress
from launch.terminal.tables import table
from pretrain.evaluation.probes.argmax import ArgmaxSettings, Positions, accuracy_table, run_argmax
from pretrain.evaluation.probes.grid import PROBE_TABLE
from pretrain.evaluation.probes.passkey import PasskeySettings, Pattern
from pretrain.evaluation.probes.passkey_grid import MEASURE_TITLES, passkey_table, run_passkey
from pretrain.model.kernels import Kind


def argmax(
    folder: Path,
    attentions: Sequence[Kind],
    positions: Sequence[Positions],
    num_seeds: int,
    steps: int,
    console: Console,
) -> None:
    """Run the argmax probe in `folder` and print its table."""
    settings, seeds = ArgmaxSettings(steps=steps), range(num_seeds)
    with StageProgress(console) as progress:
        kinds = run_argmax(
            folder, attentions, positions, seeds, settings, processes=num_cores(), report=progress.report
        )
    found = accuracy_table(kinds)
    console.print(table("Where is the largest of 64 values?", found.header, found.texts, numbers_from=2))
    say(console, f"report: {folder / PROBE_TABLE}")


def passkey(
    folder: Path,
    attentions: Sequence[Kind],
    patterns: Sequence[Pattern],
    num_seeds: int,
    steps: int,
    console: Console,
) -> None:
    """Run the passkey probe in `folder` and print the table of whole keys."""
    settings, seeds = PasskeySettings(steps=steps), range(num_seeds)
    kinds = [(attention, pattern) for attention in attentions for pattern in patterns]
    with StageProgress(console) as progress:
        results = run_passkey(folder, kinds, seeds, settings, processes=num_cores(), report=progress.report)
    found = passkey_table(results, "keys")
    console.print(table(MEASURE_TITLES["keys"], found.header, found.texts, numbers_from=3))
    say(console, f"report: {folder / PROBE_TABLE}")
