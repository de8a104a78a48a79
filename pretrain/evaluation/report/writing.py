"""A `ContextReport` as report.json, report.md, report.html, plots and TensorBoard, in the report's folder."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from pretrain.evaluation.context.interventions import MEANINGS, TITLES, title_of
from pretrain.evaluation.report.page import page
from pretrain.evaluation.report.schema import ContextReport, ReadingResult
from pretrain.files import write_json, write_text
from pretrain.run.folder import RunFolder

COLUMNS = ("context", "tokens", "loss", "95 %", "perplexity", "masked accuracy", "gain over 1x", "95 %")


REPORT, PAGE, TEXT = "report.json", "report.html", "report.md"


def table_rows(report: ContextReport) -> list[tuple[str, ...]]:
    """One row of text per length, under COLUMNS."""
    return [
        (
            f"{r.multiple:g}x",
            str(r.length),
            f"{r.loss:.3f}",
            "{:.3f} to {:.3f}".format(*r.loss_interval),
            f"{r.perplexity:.1f}",
            f"{r.masked_accuracy:.1%}",
            f"{r.gain:+.3f}",
            "{:+.3f} to {:+.3f}".format(*r.gain_interval),
        )
        for r in report.results
    ]


def reading_table(results: Sequence[ReadingResult]) -> tuple[list[str], list[list[str]]]:
    """Gain over the crop by reading and length, and the regression at 1x with the largest factor."""
    multiples = sorted({r.multiple for r in results})
    header = ["reading", *(f"gain at {m:g}x" for m in multiples), "regression at 1x"]
    rows = []
    for name in dict.fromkeys(r.reading for r in results):
        own = {r.multiple: r for r in results if r.reading == name}
        cells = [f"{own[m].gain:+.3f}{_sure(own[m].gain_interval)}" if m in own else "-" for m in multiples]
        last = own[max(own)]
        rows.append([title_of(name), *cells, f"{last.regression:+.3f}{_sure(last.regression_interval)}"])
    return header, rows


def _sure(interval: tuple[float, float]) -> str:
    """A star where the interval leaves out zero."""
    return " *" if interval[0] > 0 or interval[1] < 0 else ""


def write_report(run: RunFolder, folder: Path, report: ContextReport) -> None:
    """Write everything into `folder`; report.json comes last, so where it is, the rest is too."""
    folder.mkdir(parents=True, exist_ok=True)
    curve = [r for r in run.metrics() if r["step"] <= report.step]
    figures = {"loss_by_length": _loss_figure(report), "gain_by_length": _gain_figure(report)}
    figures["training_curve"] = _training_figure(curve, report)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    write_text(folder / TEXT, _markdown(report))
    write_text(folder / PAGE, page(report, [(r["tokens"], r["loss"]) for r in curve if "loss" in r]))
    _write_tensorboard(run.tensorboard / folder.name, report, figures)
    write_json(folder / REPORT, report.model_dump(mode="json"))


def _write_tensorboard(folder: Path, report: ContextReport, figures: dict[str, Figure]) -> None:
    """Curves over length in place of steps; an earlier evaluation of the same kind is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(folder) as board:
        for r in report.results:
            board.add_scalar("context/loss_by_length", r.loss, r.length)
            board.add_scalar("context/gain_by_length", r.gain, r.length)
            board.add_scalar("context/masked_accuracy_by_length", r.masked_accuracy, r.length)
        for t in report.tasks:
            if t.reading == "plain":
                board.add_scalar(f"context/{t.task}_by_length", t.accuracy, t.length)
        board.add_scalar("context/effective_length", report.effective_length, report.step)
        board.add_text("context/headline", report.headline, report.step)
        for name, figure in figures.items():
            board.add_figure(f"context/{name}", figure, report.step)


# ------------------------------------------------------------------------------------------------------- report.md


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _markdown(report: ContextReport) -> str:
    skipped = "".join(f"\n- {what}: {why}." for what, why in report.skipped.items())
    sections = [
        f"# Context extension of {report.run}",
        f"**{report.headline}**",
        _table(COLUMNS, table_rows(report)),
        f"Step {report.step}, {report.tokens_seen:,} tokens seen, trained at length {report.training_length}.\n"
        f"Predicting from token frequencies alone costs {report.unigram_loss:.3f} nats on these targets; the unigram "
        f"entropy of\nthe training split is {report.unigram_entropy:.3f}.",
        "![loss by length](loss_by_length.png)\n\n![gain by length](gain_by_length.png)",
        *_needing_section(report),
        *_reading_section(report),
        *_task_section(report),
        *_pseudo_section(report),
        *([f"## Not measured\n{skipped}"] if skipped else []),
        _how_to_read(report),
        _what_was_run(report),
        "![training curve](training_curve.png)",
    ]
    return "\n\n".join(sections) + "\n"


def _needing_section(report: ContextReport) -> list[str]:
    need = report.context_need
    if need is None:
        return []
    rows = [
        [
            f"{r.multiple:g}x",
            f"{r.needing_loss:.3f}",
            f"{r.needing_gain:+.3f}",
            "{:+.3f} to {:+.3f}".format(*(r.needing_gain_interval or (0, 0))),
            f"{r.helped:.1%}",
            f"{r.hurt:.1%}",
        ]
        for r in report.results
        if r.needing_loss is not None
    ]
    header = ["context", "loss of tokens that need context", "gain over 1x", "95 %", "helped", "hurt"]
    text = (
        f"{need.targets:,} of the {report.targets:,} targets need context: their loss falls by more than "
        f"{need.threshold:g} nats from\n{need.short_length} tokens to {report.training_length}, both within the "
        "training length. Helped and hurt: the share of all targets whose loss\nis lower, or higher, than at 1x by "
        "more than that."
    )
    return ["## Tokens that need context", text, _table(header, rows)]


def _reading_section(report: ContextReport) -> list[str]:
    if not report.readings:
        return []
    header, rows = reading_table(report.readings)
    meanings = "\n".join(
        f"- {TITLES[name]}: {meaning}"
        for name, meaning in MEANINGS.items()
        if any(r.reading == name for r in report.readings)
    )
    text = (
        f"No weight is changed; on the first {report.reading_windows} windows. A star: the 95 % interval leaves out "
        "zero. Regression: what\nthe reading, set for the longest length, costs at the training length."
    )
    sections = ["## Ways to read long rows", text, _table(header, rows), meanings]
    for recalibration in report.recalibrations:
        header, rows = reading_table(recalibration.results)
        title = f"### After {recalibration.tokens:,} more tokens at length {recalibration.length:,}"
        sections += [title, _table(header, rows)]
    return sections


def _task_section(report: ContextReport) -> list[str]:
    if not report.tasks:
        return []
    rows = [
        [
            t.task,
            title_of(t.reading),
            f"{t.multiple:g}x",
            f"{t.accuracy:.1%}",
            "{:.1%} to {:.1%}".format(*t.accuracy_interval),
            f"{t.chance:.1%}",
            str(t.answers),
        ]
        for t in report.tasks
    ]
    return ["## Tasks", _table(["task", "encoder", "context", "accuracy", "95 %", "chance", "answers"], rows)]


def _pseudo_section(report: ContextReport) -> list[str]:
    if not report.pseudo:
        return []
    rows = [
        [f"{p.multiple:g}x", str(p.targets), f"{p.masked_loss:.3f}", f"{p.single_loss:.3f}", f"{p.correlation:.2f}"]
        for p in report.pseudo
    ]
    header = ["context", "targets", "loss, many masked", "loss, one masked", "correlation"]
    return ["## One mask at a time", _table(header, rows)]


def _how_to_read(report: ContextReport) -> str:
    return f"""## How to read it

The same {report.targets:,} masked tokens are predicted at every length. They lie in {report.windows} blocks of
{report.training_length} tokens from {report.documents} documents of the {report.split} split; only the context around
the block grows, nested and equally masked. Loss is in nats per masked token. Gain is the loss at 1x minus the loss at
this length on the same tokens: above zero, with its interval, the encoder uses what lies beyond its training length.
Intervals are 95 %, from 1,000 bootstrap resamplings of the documents. The effective length is the longest one up to
which, at every length on the way, the loss is no worse than at 1x (within 1 %, or within the interval of the
difference) and the gain is above zero with its interval."""


def _what_was_run(report: ContextReport) -> str:
    provenance = report.provenance
    lines = [
        f"- command: `{provenance.command}`" if provenance.command else "",
        f"- config: `{provenance.config}`, seed {provenance.seed}",
        f"- corpus: `{provenance.corpus}`, fingerprint `{provenance.fingerprint}`",
        f"- checkpoint: step {report.step}, sha256 `{provenance.checkpoint_sha256}`",
        f"- Diptych {provenance.diptych}, torch {provenance.torch}, {provenance.device}, {provenance.ranks} rank(s)",
        f"- budget: {report.budget}" if report.budget else "",
        f"- written {provenance.written} UTC",
    ]
    return "## What was run\n\n" + "\n".join(line for line in lines if line)


# ----------------------------------------------------------------------------------------------------------- plots


def _length_axes(report: ContextReport, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    lengths = [r.length for r in report.results]
    axes.axvline(report.training_length, color="gray", linewidth=0.8, linestyle=":", label="training length")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(xlabel="context length in tokens", ylabel=y_label, title=report.run)
    return figure, axes


def _loss_figure(report: ContextReport) -> Figure:
    figure, axes = _length_axes(report, "loss in nats per masked token")
    lengths = [r.length for r in report.results]
    low, high = zip(*(r.loss_interval for r in report.results), strict=True)
    axes.fill_between(lengths, low, high, alpha=0.2)
    axes.plot(lengths, [r.loss for r in report.results], marker="o", label="this encoder")
    axes.axhline(report.unigram_loss, color="gray", linestyle="--", label="token frequencies alone")
    axes.legend()
    return figure


def _gain_figure(report: ContextReport) -> Figure:
    figure, axes = _length_axes(report, "gain over the crop, in nats")
    long = [r for r in report.results if r.multiple >= 1]
    low, high = zip(*(r.gain_interval for r in long), strict=True)
    axes.fill_between([r.length for r in long], low, high, alpha=0.2)
    axes.plot([r.length for r in long], [r.gain for r in long], marker="o", label="this encoder")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.legend()
    return figure


def _training_figure(records: Sequence[dict[str, float]], report: ContextReport) -> Figure:
    steps = [r for r in records if "loss" in r]
    validations = [r for r in records if "validation_loss" in r]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["tokens"] for r in steps], [r["loss"] for r in steps], linewidth=0.6, alpha=0.6, label="training")
    tokens, losses = [r["tokens"] for r in validations], [r["validation_loss"] for r in validations]
    axes.plot(tokens, losses, marker="o", label="validation")
    axes.axhline(report.unigram_entropy, color="gray", linestyle="--", label="unigram entropy")
    axes.set(xlabel="tokens seen", ylabel="loss in nats per masked token", title=report.run)
    axes.legend()
    return figure
