"""A `ContextReport` as report.json, report.md, report.html, plots and TensorBoard, in the report's folder."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from pretrain.evaluation.report.html import html_page
from pretrain.evaluation.report.markdown import markdown_page
from pretrain.evaluation.report.pictures import chart_figure
from pretrain.evaluation.report.schema import ContextReport
from pretrain.evaluation.report.sections import report_page
from pretrain.files import write_json, write_text
from pretrain.run.folder import RunFolder

REPORT, PAGE, TEXT = "report.json", "report.html", "report.md"


def write_context_report(run: RunFolder, folder: Path, report: ContextReport) -> None:
    """Write everything into `folder`; report.json comes last, so where it is, the rest is too."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [r for r in run.metrics() if r["step"] <= report.step]
    page = report_page(report, records)
    title = f"{report.run}, 1x is {report.training_length} tokens"
    figures = {name: chart_figure(chart, title) for name, chart in page.pictures.items()}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    write_text(folder / TEXT, markdown_page(page))
    write_text(folder / PAGE, html_page(page))
    _write_tensorboard(run.tensorboard / folder.name, report, figures)
    write_json(folder / REPORT, report.model_dump(mode="json"))


def _write_tensorboard(folder: Path, report: ContextReport, figures: Mapping[str, Figure]) -> None:
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
