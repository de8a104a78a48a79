"""One tiny trained run and its evaluation, shared by all tests of the evaluation."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.config.run import RunConfig
from pretrain.data.manifest import load_manifest
from pretrain.evaluation.context.evaluate import FinishedEvaluation, run_evaluation
from pretrain.evaluation.context.request import Request
from pretrain.evaluation.report.writing import write_context_report
from pretrain.run.folder import RunFolder
from pretrain.run.opening import open_run_folder
from tests.browser import CHROMIUM, Browser
from tests.conftest import tiny_run
from tests.ranks import run_on_ranks
from tests.training.test_training import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus_values) -> RunConfig:
    folder: Path = tmp_path_factory.mktemp("trained")
    config = tiny_run(
        corpus_values,
        folder / "runs",
        "run",
        training={"tokens": 40_000, "micro_batch_size": 16, "sharding": "none"},
        optimizer={"learning_rate": 1e-2},
        evaluation={"windows": 48, "reading_windows": 8, "pseudo_targets": 8},
    )
    open_run_folder(config, load_manifest(config.corpus.path))
    assert run_on_ranks(train, 1, folder / "ranks", config, 1) == [0]
    return config


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
