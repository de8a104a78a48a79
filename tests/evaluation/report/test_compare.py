"""Several reports in one: seeds averaged, and only what can be compared is."""

import shutil

import pytest
from typer.testing import CliRunner

from launch.cli import app
from launch.run_list import runs_meant
from pretrain.config.load import to_yaml
from pretrain.errors import UserError
from pretrain.evaluation.report.compare import comparison_table, read_run_kinds, write_comparison
from pretrain.evaluation.report.markdown import markdown_table
from pretrain.files import write_json
from pretrain.run.folder import RunFolder


@pytest.fixture
def runs(trained, evaluated, tmp_path):
    """Three runs: two seeds of one kind, the second with a loss higher by 0.2, and one of another kind."""
    for name, seed, added, heads in (("two-seed7", 7, 0.0, 2), ("two-seed8", 8, 0.2, 2), ("c", 7, 1.0, 4)):
        model = trained.model.model_copy(update={"num_heads": heads})
        config = trained.model_copy(update={"name": name, "seed": seed, "model": model, "runs": tmp_path / "runs"})
        results = [r.model_copy(update={"loss": r.loss + added}) for r in evaluated.report.results]
        report = evaluated.report.model_copy(update={"run": name, "results": results})
        folder = config.run_folder / "evaluation" / "context"
        folder.mkdir(parents=True)
        (config.run_folder / "config.yaml").write_text(to_yaml(config))
        write_json(folder / "report.json", report.model_dump(mode="json"))
    return tmp_path / "runs"


def test_runs_that_differ_in_their_seed_alone_are_averaged(runs, evaluated, tmp_path):
    assert runs_meant([runs.name], runs.parent) == runs_meant([str(runs)], runs)
    kinds = read_run_kinds(runs_meant([str(runs)], runs))
    assert [[r.run for r in kind.reports] for kind in kinds] == [["c"], ["two-seed7", "two-seed8"]]
    assert [kind.name for kind in kinds] == ["c", "two"]
    loss = evaluated.report.result(1).loss
    mean = kinds[1].mean("loss", 1)
    assert mean == (pytest.approx(loss + 0.1), pytest.approx(loss), pytest.approx(loss + 0.2))
    write_comparison(tmp_path / "out", kinds)
    text = (tmp_path / "out" / "compare.md").read_text()
    table = comparison_table(kinds)
    assert f"{loss + 0.1:.3f} ({loss:.3f} to {loss + 0.2:.3f})" in table.rows[1]
    assert markdown_table(table) in text


def test_of_a_folder_of_runs_those_with_a_report_are_compared(runs, tmp_path):
    shutil.rmtree(runs / "two-seed8" / "evaluation")
    result = CliRunner().invoke(app, ["compare", str(runs), "--out", str(tmp_path / "out")])
    assert "1 of 3 runs have no report, and are left out" in result.stdout
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| two-seed7 | 1 |" in text
    assert "two-seed8" not in text


def test_the_comparison_renders_on_a_phone(runs, tmp_path, browser):
    write_comparison(tmp_path / "out", read_run_kinds(runs_meant([str(runs / "two-seed7"), "c"], runs)))
    page = tmp_path / "out" / "compare.html"
    fits, charts = (
        "document.documentElement.scrollWidth <= window.innerWidth",
        "document.querySelectorAll('svg').length",
    )
    view = browser.view(page, 360, 740, [fits, charts])
    assert (view.complaints, view.values[fits]) == ([], True)
    assert view.values[charts] >= 2
    assert [url for url in view.requests if not url.startswith("data:")] == [page.as_uri()]


def test_what_cannot_be_compared_is_refused(runs, evaluated):
    path = runs / "c" / "evaluation" / "context" / "report.json"
    provenance = evaluated.report.provenance.model_copy(update={"fingerprint": "f" * 64})
    write_json(path, evaluated.report.model_copy(update={"provenance": provenance}).model_dump(mode="json"))
    compared = [RunFolder(runs / "two-seed7"), RunFolder(runs / "c")]
    with pytest.raises(UserError, match="different corpora"):
        read_run_kinds(compared)
    shutil.rmtree(runs / "c" / "evaluation")
    with pytest.raises(UserError, match="diptych evaluate context"):
        read_run_kinds(compared)
    with pytest.raises(UserError, match="no run 'd'"):
        runs_meant(["d"], runs)
