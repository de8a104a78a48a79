"""Several reports in one: their curves side by side, seeds of one kind of run averaged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain import __version__
from pretrain.config.identity import changes
from pretrain.errors import UserError
from pretrain.evaluation.report.charts import Line
from pretrain.evaluation.report.html import html_page
from pretrain.evaluation.report.markdown import markdown_page
from pretrain.evaluation.report.schema import ContextReport, read_report
from pretrain.evaluation.report.section import NATS, Card, Facts, Page, ReportSection, Table, over_context
from pretrain.files import write_text
from pretrain.run.folder import RunFolder

_NAMES = ("seed", "name", "runs")
"""Keys of the config in which runs of one kind may differ."""


@dataclass(frozen=True)
class RunKind:
    """Runs that differ in nothing but their seed."""

    name: str
    reports: list[ContextReport]

    def mean(self, field: str, multiple: float) -> tuple[float, float, float] | None:
        """Mean, lowest and highest over the seeds; None unless all of them were measured at this length."""
        found = [getattr(r, field) for report in self.reports for r in report.results if r.multiple == multiple]
        if len(found) < len(self.reports) or None in found:
            return None
        return sum(found) / len(found), min(found), max(found)


def read_run_kinds(runs: Sequence[RunFolder], evaluation: str = "context") -> list[RunKind]:
    """The reports of some runs, those that differ in nothing but the seed together, in the order given.

    Args:
        runs: in the order of the comparison.
        evaluation: name of the report's folder inside `evaluation/`.

    Raises:
        UserError: a run has no report of this version, or two were measured on different documents or lengths.
    """
    kinds: list[tuple[RunFolder, RunKind]] = []
    for run in dict.fromkeys(runs):
        report = read_report(run.report(evaluation))
        for other, kind in kinds:
            if not _differences(run, other):
                kind.reports.append(report)
                break
        else:
            kinds.append((run, RunKind(run.name, [report])))
    found = [RunKind(_without_seed(k.name), k.reports) if len(k.reports) > 1 else k for _, k in kinds]
    _check_comparable([report for kind in found for report in kind.reports])
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


def comparison_table(kinds: Sequence[RunKind]) -> Table:
    """Return loss and gain of every kind of run at every length, means over its seeds."""
    multiples = _multiples(kinds)
    long = [m for m in multiples if m > 1]
    rows = []
    for kind in kinds:
        losses = [_mean_and_range(kind.mean("loss", m), ".3f") for m in multiples]
        gains = [_mean_and_range(kind.mean("gain", m), "+.3f") for m in long]
        effective = ", ".join(f"{report.effective_multiple:g}x" for report in kind.reports)
        rows.append([kind.name, str(len(kind.reports)), *losses, *gains, effective])
    columns = [*(f"loss at {m:g}x" for m in multiples), *(f"gain at {m:g}x" for m in long)]
    return Table(["run", "seeds", *columns, "effective length"], rows)


def _mean_and_range(found: tuple[float, float, float] | None, form: str) -> str:
    if found is None:
        return "-"
    mean, low, high = (format(value, form) for value in found)
    return mean if low == high else f"{mean} ({low} to {high})"


def _multiples(kinds: Sequence[RunKind]) -> list[float]:
    return sorted({r.multiple for kind in kinds for report in kind.reports for r in report.results})


def write_comparison(folder: Path, kinds: Sequence[RunKind]) -> None:
    """Write compare.html and compare.md."""
    page = _comparison_page(kinds)
    write_text(folder / "compare.md", markdown_page(page))
    write_text(folder / "compare.html", html_page(page))


def _comparison_page(kinds: Sequence[RunKind]) -> Page:
    cards = [
        Card("Loss by context length", over_context(_lines(kinds, "loss", 0), NATS, zero=False)),
        Card("Gain over the crop", over_context(_lines(kinds, "gain", 1), NATS), "Above zero, far context helps."),
    ]
    if needing := _lines(kinds, "needing_gain", 1):
        cards.append(Card("Gain of the tokens that need context", over_context(needing, NATS)))
    note = (
        "Loss in nats per masked token. Gain: loss from the window of the training length minus loss from the longer "
        "one, on the same tokens. Runs that differ in nothing but their seed are averaged; in brackets, the lowest and "
        "the highest."
    )
    cards.append(Card("Every run", comparison_table(kinds), note, wide=True))
    reports = [report for kind in kinds for report in kind.reports]
    facts = [
        (
            r.run,
            f"{r.headline} Seed {r.provenance.seed}, step {r.step}, {r.tokens_seen:,} tokens; {r.provenance.config}",
        )
        for r in reports
    ]
    return Page(
        title="Context extension compared",
        kind="Context extension compared",
        heading=f"{len(kinds)} kinds of run, {len(reports)} reports",
        sections=[
            ReportSection("Curves", "Bands reach from the lowest seed to the highest.", cards),
            ReportSection("What was compared", cards=[Card("Every report", Facts(facts), wide=True)]),
        ],
        footer=f"Written by Diptych {__version__}.",
    )


def _lines(kinds: Sequence[RunKind], field: str, lowest: float) -> list[Line]:
    """Return a line per kind of run, from the length `lowest` on."""
    lines = []
    for kind in kinds:
        means = [(m, found) for m in _multiples(kinds) if m >= lowest and (found := kind.mean(field, m))]
        band = [(low, high) for _, (_, low, high) in means] if len(kind.reports) > 1 else []
        lines.append(Line(kind.name, [(m, mean) for m, (mean, *_) in means], band))
    return [line for line in lines if line.points]
