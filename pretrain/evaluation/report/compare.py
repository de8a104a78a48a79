"""Several reports in one: their curves side by side, seeds of one kind of run averaged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from pretrain import __version__
from pretrain.config.identity import changes
from pretrain.errors import UserError
from pretrain.evaluation.report.charts import Line, line_chart
from pretrain.evaluation.report.page import Cell, card, document, grid, section, table
from pretrain.evaluation.report.schema import ContextReport, read_report
from pretrain.files import write_text
from pretrain.run.folder import RunFolder

_NAMES = ("seed", "name", "runs")
"""Keys of the config in which runs of one kind may differ."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    name: str
    reports: list[ContextReport]

    def mean(self, field: str, multiple: float) -> tuple[float, float, float] | None:
        """Mean, lowest and highest over the seeds; None unless all of them were measured at this length."""
        found = [getattr(r, field) for report in self.reports for r in report.results if r.multiple == multiple]
        if len(found) < len(self.reports) or None in found:
            return None
        return sum(found) / len(found), min(found), max(found)


def read_groups(runs: Sequence[RunFolder], evaluation: str = "context") -> list[Group]:
    """The reports of some runs, those that differ in nothing but the seed together, in the order given.

    Args:
        runs: in the order of the comparison.
        evaluation: name of the report's folder inside `evaluation/`.

    Raises:
        UserError: a run has no report of this version, or two were measured on different documents or lengths.
    """
    groups: list[tuple[RunFolder, Group]] = []
    for run in dict.fromkeys(runs):
        report = read_report(run.report(evaluation))
        for other, group in groups:
            if not _differences(run, other):
                group.reports.append(report)
                break
        else:
            groups.append((run, Group(run.name, [report])))
    found = [Group(_without_seed(g.name), g.reports) if len(g.reports) > 1 else g for _, g in groups]
    _check_comparable([report for group in found for report in group.reports])
    return found


def _without_seed(name: str) -> str:
    """A sweep's name of a member, for all its seeds."""
    return re.sub(r"(^|-)seed\d+(?=-|$)", "", name).lstrip("-") or name


def _differences(*runs: RunFolder) -> set[str]:
    """Keys of the configs that make two runs different kinds of run."""
    configs = (other.public_config() for other in runs)
    return {key for key in changes(*configs) if key not in _NAMES}


def _check_comparable(reports: Sequence[ContextReport]) -> None:
    first = reports[0]
    for report in reports[1:]:
        for what, a, b in (
            ("corpora", first.provenance.fingerprint, report.provenance.fingerprint),
            ("splits", first.split, report.split),
            ("training lengths", str(first.training_length), str(report.training_length)),
        ):
            if a != b:
                raise UserError(
                    f"{first.run} and {report.run} were measured on different {what} ({a[:12]} and {b[:12]}): their "
                    "losses cannot be compared. Evaluate both on the same with `diptych evaluate context --corpus`"
                )


def table_rows(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: loss and gain of every group at every length, means over its seeds."""
    multiples = _multiples(groups)
    header = ["run", "seeds", *(f"loss at {m:g}x" for m in multiples), *(f"gain at {m:g}x" for m in multiples if m > 1)]
    header.append("effective length")
    rows = []
    for group in groups:
        losses = [_cell(group.mean("loss", m), ".3f") for m in multiples]
        gains = [_cell(group.mean("gain", m), "+.3f") for m in multiples if m > 1]
        effective = ", ".join(f"{report.effective_multiple:g}x" for report in group.reports)
        rows.append([group.name, str(len(group.reports)), *losses, *gains, effective])
    return header, rows


def _cell(found: tuple[float, float, float] | None, form: str) -> str:
    if found is None:
        return "-"
    mean, low, high = (format(value, form) for value in found)
    return mean if low == high else f"{mean} ({low} to {high})"


def _multiples(groups: Sequence[Group]) -> list[float]:
    return sorted({r.multiple for group in groups for report in group.reports for r in report.results})


def write_comparison(folder: Path, groups: Sequence[Group]) -> None:
    """Write compare.html and compare.md."""
    header, rows = table_rows(groups)
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]
    runs = "\n".join(
        f"- {r.run}: seed {r.provenance.seed}, step {r.step}, `{r.provenance.config}`" for r in _all(groups)
    )
    text = "\n".join(lines)
    write_text(folder / "compare.md", f"# Context extension compared\n\n{text}\n\n{_NOTE}\n\n{runs}\n")
    write_text(folder / "compare.html", document("Context extension compared", _body(groups, header, rows)))


_NOTE = (
    "Loss in nats per masked token. Gain: loss from the window of the training length minus loss from the longer one, "
    "on the same tokens.\nRuns that differ in nothing but their seed are averaged; in brackets, the lowest and the "
    "highest."
)


def _all(groups: Sequence[Group]) -> list[ContextReport]:
    return [report for group in groups for report in group.reports]


def _body(groups: Sequence[Group], header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def lines(field: str, lowest: float) -> list[Line]:
        made = []
        for group in groups:
            means = {m: group.mean(field, m) for m in _multiples(groups) if m >= lowest}
            points = [(m, found[0]) for m, found in means.items() if found]
            band = [(found[1], found[2]) for found in means.values() if found] if len(group.reports) > 1 else []
            made.append(Line(group.name, points, band))
        return [line for line in made if line.points]

    def chart(field: str, lowest: float, *, zero: bool) -> str:
        drawn = lines(field, lowest)
        return line_chart(
            drawn,
            x_label="context",
            y_label="nats per masked token",
            log_x=True,
            x_ticks=sorted({x for line in drawn for x, _ in line.points}),
            x_name=lambda x: f"{x:g}x",
            zero=zero,
        )

    cards = [
        card("Loss by context length", chart("loss", 0, zero=False)),
        card("Gain over the crop", chart("gain", 1, zero=True), "Above zero, far context helps."),
    ]
    if lines("needing_gain", 1):
        cards.append(card("Gain of the tokens that need context", chart("needing_gain", 1, zero=True)))
    cells: list[list[Cell]] = [list(row) for row in rows]
    cards.append(card("Every run", table(header, cells), _NOTE, wide=True))
    reports = _all(groups)
    facts = "".join(
        f"<dt>{escape(r.run)}</dt><dd>{escape(r.headline)} Seed {r.provenance.seed}, step {r.step}, "
        f"{r.tokens_seen:,} tokens; {escape(r.provenance.config)}</dd>"
        for r in reports
    )
    return (
        f'<header><p class="eyebrow">Context extension compared</p><h1>{len(groups)} kinds of run, {len(reports)} '
        f"reports</h1></header>{section('Curves', 'Bands reach from the lowest seed to the highest.', grid(*cards))}"
        f"{section('What was compared', '', f'<dl>{facts}</dl>')}<footer>Written by Diptych {__version__}.</footer>"
    )
