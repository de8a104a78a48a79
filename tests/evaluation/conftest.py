"""The trained run and its evaluation, shared by all tests of the evaluation."""

from collections.abc import Iterator

import pytest

from pretrain.config.run import RunConfig
from pretrain.evaluation.context.evaluate import FinishedEvaluation, run_evaluation
from pretrain.evaluation.context.request import Request
from pretrain.evaluation.report.writing import write_context_report
from pretrain.run.folder import RunFolder
from tests.browser import CHROMIUM, Browser
from tests.conftest import TRAINED, copy_of_run, tiny_run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus_values, trained_once) -> RunConfig:
    evaluation = {"windows": 48, "reading_windows": 8, "pseudo_targets": 8}
    runs = tmp_path_factory.mktemp("evaluated") / "runs"
    return copy_of_run(trained_once, tiny_run(corpus_values, runs, "run", **TRAINED, evaluation=evaluation))


@pytest.fixture(scope="session")
def evaluated(trained) -> FinishedEvaluation:
    """The evaluation as it is after every training, and its report written."""
    finished = run_evaluation(Request(trained.run_folder), command=["diptych", "evaluate", "context", "run"])
    write_context_report(RunFolder.of(trained), finished.folder, finished.report)
    return finished


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, which takes seconds to start; each test looks at a page of its own."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here; install Debian's package chromium")
    with Browser() as browser:
        yield browser
