"""Paired timing, verdicts and results files, shared by the benchmarks. What is measured is theirs.

Variants are timed in turn, round after round (A B C, then C B A, ...), so that what else the machine does falls on
all of them alike; a comparison is the median of the ratios within a round, with the smallest and the largest.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch

from pretrain.files import write_json, write_text

Sense = Literal["at most", "at least"]


@dataclass(frozen=True)
class Row:
    """One comparison, measured or not."""

    name: str
    """Where and what, for instance `cpu forward+backward L=4096`."""
    subject: str
    reference: str
    quantity: str
    """What the ratio is of, for instance `time of the first / time of the second`."""
    sense: Sense | None = None
    target: float | None = None
    """None: for information."""
    subject_value: float | None = None
    """Median, in `unit`."""
    reference_value: float | None = None
    unit: str = "ms"
    ratio: float | None = None
    """Median of the rounds' ratios."""
    lowest: float | None = None
    highest: float | None = None
    unmeasured: str | None = None
    """Why there are no numbers."""
    curve: str | None = None
    """Of a row that is a point of a plot: what is plotted over `length`."""
    length: int | None = None

    @property
    def verdict(self) -> str:
        """met, not met, unmeasured, or - where there is no target."""
        if self.ratio is None:
            return "unmeasured"
        if self.target is None:
            return "-"
        reached = self.ratio <= self.target if self.sense == "at most" else self.ratio >= self.target
        return "met" if reached else "not met"


def paired(
    variants: dict[str, Callable[[], object]], rounds: int, *, min_sample_s: float = 0.05
) -> dict[str, list[float]]:
    """Seconds a call of each variant, one per round, after a warm-up.

    A sample is as many calls as take `min_sample_s`.
    """
    calls = {}
    for name, call in variants.items():
        _timed(call, 1)
        calls[name] = max(1, round(min_sample_s / max(_timed(call, 1), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            seconds[name].append(_timed(variants[name], calls[name]) / calls[name])
    return seconds


def _timed(call: Callable[[], object], calls: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(planned: Row, subject: Sequence[float], reference: Sequence[float], *, speedup: bool = False) -> Row:
    """`planned` with the numbers of two variants' rounds, in seconds; `speedup` turns the ratio round."""
    ratios = [r / s if speedup else s / r for s, r in zip(subject, reference, strict=True)]
    return Row(
        **{
            **asdict(planned),
            "subject_value": 1e3 * statistics.median(subject),
            "reference_value": 1e3 * statistics.median(reference),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
    )


def machine() -> dict[str, Any]:
    """What it was measured on and with."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def command() -> str:
    """As it was typed, at the top of the checkout."""
    return " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def write_results(path: Path, title: str, rows: Sequence[Row], on: dict[str, Any], plot: str | None = None) -> None:
    """Write `path`.json and `path`.md, which shows the picture `plot` beside it, if there is one."""
    records = [{**asdict(row), "verdict": row.verdict} for row in rows]
    write_json(path.with_suffix(".json"), {"format": 1, "machine": on, "command": command(), "rows": records})
    gpu = f"; {on['gpu']}" if on["gpu"] else "; no GPU"
    head = (
        f"{on['cores']} cores ({on['cpu']}), {on['threads']} threads{gpu}; load average before: "
        f"{on['load_average_before']}. Python {on['python']}, torch {on['torch']}, {on['date']}: `{command()}`."
    )
    picture = f"![{title}]({plot})\n\n" if plot else ""
    write_text(path.with_suffix(".md"), f"# {title}\n\n{head}\n\n{picture}{markdown(rows)}")


def markdown(rows: Sequence[Row]) -> str:
    """The table."""
    lines = [
        "| what | first | second | ratio | lowest to highest | target | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        target = "" if row.target is None else f"{row.sense} {row.target:g}"
        values = (
            [row.subject, row.reference, "", ""]
            if row.ratio is None
            else [
                f"{row.subject}: {row.subject_value:.3g} {row.unit}",
                f"{row.reference}: {row.reference_value:.3g} {row.unit}",
                f"**{row.ratio:.3f}**",
                f"{row.lowest:.3f} to {row.highest:.3f}",
            ]
        )
        verdict = f"unmeasured: {row.unmeasured}" if row.ratio is None else row.verdict
        lines.append(f"| {' | '.join([f'{row.name}: {row.quantity}', *values, target, verdict])} |")
    return "\n".join(lines) + "\n"
