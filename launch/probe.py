"""`diptych evaluate probe`: synthetic probes with progress, and their tables on a terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from launch.local.ranks import num_cores
from launch.terminal.console import say
from launch.terminal.progress import StageProgress
from launch.terminal.tables import table
from pretrain.evaluation.probes import passkey_grid as passkeys
from pretrain.evaluation.probes.argmax import COLUMNS, Positions, ProbeSettings, run_argmax, table_rows
from pretrain.evaluation.probes.grid import TABLE, Attention
from pretrain.evaluation.probes.passkey import PasskeySettings, Pattern


def argmax(
    folder: Path,
    attentions: Sequence[Attention],
    positions: Sequence[Positions],
    num_seeds: int,
    steps: int,
    console: Console,
) -> None:
    """Run the argmax probe in `folder` and print its table."""
    settings, seeds = ProbeSettings(steps=steps), range(num_seeds)
    with StageProgress(console) as progress:
        kinds = run_argmax(
            folder, attentions, positions, seeds, settings, processes=num_cores(), report=progress.report
        )
    console.print(table("Where is the largest of 64 values?", COLUMNS, table_rows(kinds), numbers_from=2))
    say(console, f"report: {folder / TABLE}")


def passkey(
    folder: Path,
    attentions: Sequence[Attention],
    patterns: Sequence[Pattern],
    num_seeds: int,
    steps: int,
    console: Console,
) -> None:
    """Run the passkey probe in `folder` and print the table of whole keys."""
    settings, seeds = PasskeySettings(steps=steps), range(num_seeds)
    kinds = [(attention, pattern) for attention in attentions for pattern in patterns]
    with StageProgress(console) as progress:
        results = passkeys.run_passkey(folder, kinds, seeds, settings, processes=num_cores(), report=progress.report)
    rows = passkeys.table_rows(results, "keys")
    console.print(table(passkeys.TITLES["keys"], passkeys.columns(settings), rows, numbers_from=3))
    say(console, f"report: {folder / TABLE}")
