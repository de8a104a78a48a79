"""A `ContextReport` as report.json, report.md and plots, in the run's `evaluation/context/`."""

from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from pretrain.evaluation.context import ContextReport
from pretrain.files import write_json, write_text
from pretrain.training.metrics import read_metrics

COLUMNS = ("context", "tokens", "loss", "95 %", "perplexity", "masked accuracy", "gain over 1x", "95 %")


def table_rows(report: ContextReport) -> list[tuple[str, ...]]:
    """One row of text per length, under COLUMNS."""
    return [
        (
            f"{r.multiple}x",
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


def headline(report: ContextReport) -> str:
    """The answer in a sentence: up to where the loss is held, and where the context helps."""
    base = report.results[0].loss
    holds = [r for r in report.results if r.loss <= 1.01 * base]
    helps = [r for r in report.results[1:] if r.gain_interval[0] > 0]
    text = f"Within 1 % of its loss at the training length up to {holds[-1].multiple}x"
    if helps:
        return f"{text}; more context than trained on helps at {', '.join(f'{r.multiple}x' for r in helps)}."
    return f"{text}; more context than trained on helps nowhere."


def write_report(run_folder: Path, report: ContextReport) -> Path:
    """Write the report and its plots; returns their folder, `context` for the test split, else `context-valid`."""
    folder = run_folder / "evaluation" / ("context" if report.split == "test" else f"context-{report.split}")
    folder.mkdir(parents=True, exist_ok=True)
    _plot_lengths(report, folder / "loss_by_length.png")
    _plot_training(run_folder, report, folder / "training_curve.png")
    write_json(folder / "report.json", {"format": 1, "headline": headline(report), **asdict(report)})
    write_text(folder / "report.md", _markdown(report))
    return folder


def _markdown(report: ContextReport) -> str:
    header = " | ".join(COLUMNS)
    rows = "\n".join(f"| {' | '.join(row)} |" for row in table_rows(report))
    skipped = "".join(f"\n- {multiple}x was not measured: {why}." for multiple, why in report.skipped.items())
    return f"""# Context extension of {report.run}

**{headline(report)}**

| {header} |
|{"---|" * len(COLUMNS)}
{rows}
{skipped}

Step {report.step}, {report.tokens_seen:,} tokens seen, trained at length {report.training_length}.
Predicting from token frequencies alone costs {report.unigram_loss:.3f} nats on these targets; the unigram entropy of
the training split is {report.unigram_entropy:.3f}.

![loss by length](loss_by_length.png)

![training curve](training_curve.png)

## How to read it

The same {report.targets:,} masked tokens are predicted at every length. They lie in {report.windows} blocks of
{report.training_length} tokens from {report.documents} documents of the {report.split} split; only the context around
the block grows, nested and equally masked. Loss is in nats per masked token. Gain is the loss at 1x minus the loss at
this length on the same tokens: above zero, with its interval, the encoder uses what lies beyond its training length.
Intervals are 95 %, from 1,000 bootstrap resamplings of the documents.

Corpus fingerprint `{report.fingerprint}`.
"""


def _plot_lengths(report: ContextReport, path: Path) -> None:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    lengths = [r.length for r in report.results]
    losses = [r.loss for r in report.results]
    low, high = zip(*(r.loss_interval for r in report.results), strict=True)
    axes.fill_between(lengths, low, high, alpha=0.2)
    axes.plot(lengths, losses, marker="o", label="this encoder")
    axes.axhline(report.unigram_loss, color="gray", linestyle="--", label="token frequencies alone")
    axes.axvline(report.training_length, color="gray", linewidth=0.8, linestyle=":", label="training length")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(xlabel="context length in tokens", ylabel="loss in nats per masked token", title=report.run)
    axes.legend()
    figure.savefig(path, dpi=120)


def _plot_training(run_folder: Path, report: ContextReport, path: Path) -> None:
    records = [r for r in read_metrics(run_folder / "metrics.jsonl") if r["step"] <= report.step]
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
    figure.savefig(path, dpi=120)
