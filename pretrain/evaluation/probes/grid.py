"""The grid of a synthetic probe: small encoders trained from scratch, one cell each, and the files that keep them.

What a probe asks and how a cell is trained is the probe's own: argmax.py, passkey.py.
"""

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from matplotlib.figure import Figure

from pretrain.errors import UserError
from pretrain.files import write_json, write_text

Attention = Literal["dual_triangle", "bidirectional", "causal"]


Report = Callable[[str, int, int], None]
"""Called with (what, done, total), in cells."""


RESULTS, TABLE, PLOT = "results.json", "table.md", "accuracy.png"


COLOURS: dict[Attention, str] = {"dual_triangle": "#7c3aed", "bidirectional": "#6b7280", "causal": "#d97706"}


_CURVE_POINTS = 20


class Cell(Protocol):
    """One training: a kind of encoder and a seed; a frozen dataclass."""

    @property
    def name(self) -> str:
        """Of its file."""
        ...

    def __hash__(self) -> int: ...


class CellResult(Protocol):
    """What became of a cell; a frozen dataclass, with its settings."""

    @property
    def cell(self) -> Any:
        """The cell."""
        ...


C = TypeVar("C", bound=Cell)


R = TypeVar("R", bound=CellResult)


def train_grid(
    folder: Path,
    grid: Sequence[C],
    settings: Any,
    train: Callable[[C, Any], R],
    restore: Callable[[dict[str, Any], C, Any], R],
    *,
    processes: int = 1,
    report: Report = lambda *_: None,
) -> list[R]:
    """Train the cells that are not yet trained. Every finished one is a file in `folder`/cells.

    Args:
        folder: where everything goes.
        grid: the cells.
        settings: of each training, a dataclass of plain values.
        train: a function of a module, called as train(cell, settings), in other processes too; pure.
        restore: a result again, from (what its file holds, cell, settings).
        processes: how many cells to train at once; the results do not depend on it.
        report: called as cells are done.

    Returns:
        The results, in the order of `grid`.

    Raises:
        UserError: the folder holds cells of other settings.
    """
    done: dict[C, R] = {}
    for cell in grid:
        if (content := _load_cell(folder, cell, settings)) is not None:
            done[cell] = restore(content, cell, settings)
    report("training encoders", len(done), len(grid))
    missing = [cell for cell in grid if cell not in done]
    for result in _in_processes(partial(_train_one, train, settings), missing, processes):
        done[result.cell] = result
        write_json(_cell_path(folder, result.cell), asdict(result))  # type: ignore[call-overload]
        report("training encoders", len(done), len(grid))
    return [done[cell] for cell in grid]


def _train_one(train: Callable[[C, Any], R], settings: Any, cell: C) -> R:
    return train(cell, settings)


def _in_processes(train: Callable[[C], R], cells: Sequence[C], processes: int) -> Iterator[R]:
    """Results as they come."""
    if processes == 1 or len(cells) < 2:
        yield from map(train, cells)
        return
    # Leaving the pool, by an interruption too, ends its processes. Not a fork: torch has threads by now.
    with multiprocessing.get_context("spawn").Pool(min(processes, len(cells)), _leave_interrupts_to_parent) as pool:
        yield from pool.imap_unordered(train, cells)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cell_path(folder: Path, cell: Cell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _load_cell(folder: Path, cell: Cell, settings: Any) -> dict[str, Any] | None:
    """What the file of a cell holds, if there is one."""
    path = _cell_path(folder, cell)
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(asdict(settings)))
    if content["settings"] != wanted:
        saved = content["settings"]
        other = {key: saved.get(key) for key in saved | wanted if saved.get(key) != wanted.get(key)}
        raise UserError(
            f"{path} was trained with other settings ({', '.join(f'{k}={v}' for k, v in other.items())}); choose "
            "another folder with --out, or remove this one"
        )
    return content


def write_results(folder: Path, document: Mapping[str, Any], table: str, figure: Figure) -> None:
    """Write results.json, table.md and accuracy.png."""
    write_json(folder / RESULTS, {"format": 1, "torch": torch.__version__, **document})
    write_text(folder / TABLE, table)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / PLOT, dpi=110)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table for a document."""
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# -------------------------------------------------------------------------------------------------- of a training


@contextmanager
def one_thread() -> Iterator[None]:
    """So small an encoder gains nothing by a second thread, and its sums come in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def learning_rate_share(step: int, steps: int, warmup: float, decay: float) -> float:
    """Share of the learning rate at a step, from 0: it rises, stays and falls linearly to zero.

    Args:
        step: which.
        steps: all there are.
        warmup: share of them during which it rises.
        decay: share of them, at the end, during which it falls.
    """
    rising = (step + 1) / max(warmup * steps, 1)
    falling = (steps - step) / max(decay * steps, 1)
    return min(1.0, rising, falling)


def curve_steps(steps: int) -> frozenset[int]:
    """The steps, from 1, at which a point of the training's curve is drawn."""
    return frozenset(round(steps * k / _CURVE_POINTS) for k in range(1, _CURVE_POINTS + 1)) - {0}
