"""The grid of a probe: small encoders trained from scratch, one cell each, and the files that keep them.

What a probe asks and how a cell is trained is the probe's own: argmax.py, passkey.py.
"""

import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from matplotlib.figure import Figure

from pretrain.errors import UserError
from pretrain.evaluation.context.plan import Progress
from pretrain.files import write_json, write_text

PROBE_TABLE = "table.md"


class ProbeCell(Protocol):
    """One training: a kind of encoder and a seed; a frozen dataclass."""

    @property
    def kind(self) -> tuple[Any, Any]:
        """Attention, and what else makes the kind; equal for cells that differ in their seed alone."""
        ...

    @property
    def name(self) -> str:
        """Name of its file."""
        ...

    def __hash__(self) -> int: ...


class ProbeResult(Protocol):
    """What became of a cell; a frozen dataclass, with its settings."""

    @property
    def cell(self) -> Any:
        """The cell."""
        ...


CellT = TypeVar("CellT", bound=ProbeCell)

ResultT = TypeVar("ResultT", bound=ProbeResult)


def train_grid(
    folder: Path,
    grid: Sequence[CellT],
    settings: Any,
    train: Callable[[CellT, Any], ResultT],
    restore: Callable[[dict[str, Any], CellT, Any], ResultT],
    *,
    processes: int = 1,
    report: Progress = lambda *_: None,
) -> list[ResultT]:
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
    done: dict[CellT, ResultT] = {}
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


def _train_one(train: Callable[[CellT, Any], ResultT], settings: Any, cell: CellT) -> ResultT:
    return train(cell, settings)


def _in_processes(train: Callable[[CellT], ResultT], cells: Sequence[CellT], processes: int) -> Iterator[ResultT]:
    """Yield results as they come."""
    if processes == 1 or len(cells) < 2:
        yield from map(train, cells)
        return
    # Leaving the pool, by an interruption too, ends its processes. Not a fork: torch has threads by now.
    with multiprocessing.get_context("spawn").Pool(min(processes, len(cells)), _leave_interrupts_to_parent) as pool:
        yield from pool.imap_unordered(train, cells)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _cell_path(folder: Path, cell: ProbeCell) -> Path:
    return folder / "cells" / f"{cell.name}.json"


def _load_cell(folder: Path, cell: ProbeCell, settings: Any) -> dict[str, Any] | None:
    """Return what the file of a cell holds, if there is one."""
    path = _cell_path(folder, cell)
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps(asdict(settings)))
    saved = content["settings"]
    other = {key: saved.get(key) for key in saved | wanted if saved.get(key) != wanted.get(key)}
    if other:
        raise UserError(
            f"{path} was trained with other settings ({', '.join(f'{k}={v}' for k, v in other.items())}); choose "
            "another folder with --out, or remove this one"
        )
    return content


def by_kind(results: Sequence[ResultT]) -> dict[tuple[Any, Any], list[ResultT]]:
    """Return the results of each kind of encoder, one for each seed, in the order in which the kinds appear."""
    kinds: dict[tuple[Any, Any], list[ResultT]] = {}
    for result in results:
        kinds.setdefault(result.cell.kind, []).append(result)
    return kinds


def write_results(folder: Path, document: Mapping[str, Any], tables: str, figure: Figure) -> None:
    """Write results.json, table.md and accuracy.png."""
    write_json(folder / "results.json", {"format": 1, "torch": torch.__version__, **document})
    write_text(folder / PROBE_TABLE, f"{tables}\n")
    figure.savefig(folder / "accuracy.png", dpi=110)
