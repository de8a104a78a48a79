"""`diptych sweep show`: the members' results, averaged over seeds, as a table and a plot."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from launch.grid.members import SEED, Member, read_members
from launch.run_list import describe_run
from launch.terminal.tables import table
from pretrain.run.folder import RunFolder

CURVES_PLOT = "curves.png"


@dataclass(frozen=True)
class Result:
    """What came out of one member."""

    member: Member
    state: str
    tokens: list[int]
    """Tokens seen at each validation."""
    validation_losses: list[float]
    context_losses: dict[int, float]
    """Context length in tokens -> loss; empty until the member is evaluated."""

    @property
    def kind(self) -> tuple[str, ...]:
        """Place of the member on the axes, the seed left out."""
        return tuple(label for axis, label in self.member.labels.items() if axis != SEED)


def read_results(folder: Path, now: float) -> list[Result]:
    """The results of a sweep's members, finished or not.

    Raises:
        UserError: this is no sweep.
    """
    results = []
    for member in read_members(folder):
        run = RunFolder(folder / member.name)
        validations = [r for r in run.metrics() if "validation_loss" in r]
        contexts: dict[int, float] = {}
        for report in run.reports()[:1]:
            contexts = {r["length"]: r["loss"] for r in json.loads(report.read_bytes())["results"]}
        losses = [r["validation_loss"] for r in validations]
        state = describe_run(run, now).state
        results.append(Result(member, state, [r["tokens"] for r in validations], losses, contexts))
    return results


def results_table(name: str, results: Sequence[Result]) -> Table:
    """A row per kind: mean and standard deviation over the members that have a value, and how many are done."""
    axes = [axis for axis in results[0].member.labels if axis != SEED]
    lengths = sorted({length for result in results for length in result.context_losses})
    kinds: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        kinds[result.kind].append(result)
    rows = []
    for kind, group in kinds.items():
        done = sum(result.state == "done" for result in group)
        validation = spread([result.validation_losses[-1] for result in group if result.validation_losses])
        contexts = [spread([r.context_losses[n] for r in group if n in r.context_losses]) for n in lengths]
        rows.append([*kind, f"{done} of {len(group)}", validation, *contexts])
    columns = [*axes, "done", "validation loss", *(f"loss at {length}" for length in lengths)]
    return table(f"Sweep {name}, mean ± standard deviation over seeds", columns, rows, numbers_from=len(axes))


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, as far as they are known."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def plot_curves(folder: Path, results: Sequence[Result]) -> Path:
    """Validation losses over tokens, a colour per kind and a line per member."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    colours: dict[tuple[str, ...], str] = {}
    for result in results:
        new = result.kind not in colours
        colour = colours.setdefault(result.kind, f"C{len(colours) % 10}")
        label = (", ".join(result.kind) or folder.name) if new else None
        axes.plot(result.tokens, result.validation_losses, color=colour, marker=".", linewidth=1, label=label)
    axes.set(xlabel="tokens seen", ylabel="validation loss in nats per masked token", title=folder.name)
    axes.legend(fontsize="small")
    path = folder / CURVES_PLOT
    figure.savefig(path, dpi=120)
    return path
