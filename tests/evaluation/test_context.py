"""The context evaluation: the same targets at every length, and what follows from their losses."""

import json
import re

import numpy as np
import pytest

from pretrain.batch import IGNORED
from pretrain.data.loader import masking_rule
from pretrain.data.manifest import load_manifest
from pretrain.errors import UserError
from pretrain.evaluation import context
from pretrain.evaluation.context import evaluate_run
from pretrain.evaluation.report import headline, table_rows, write_report
from pretrain.training.run_folder import open_run_folder
from tests.conftest import tiny_run
from tests.ranks import run_on_ranks
from tests.training.test_training import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus_values):
    folder = tmp_path_factory.mktemp("trained")
    config = tiny_run(
        corpus_values,
        folder / "runs",
        "run",
        training={"tokens": 40_000, "micro_batch_size": 16, "sharding": "none"},
        optimizer={"learning_rate": 1e-2},
        evaluation={"windows": 48},
    )
    open_run_folder(config, load_manifest(config.corpus.path))
    assert run_on_ranks(train, 1, folder / "ranks", config, 1) == [0]
    return config


def test_losses_of_a_trained_run_lie_below_unigram_and_the_report_says_them(trained):
    report = evaluate_run(trained.run_folder)
    assert [r.multiple for r in report.results] == [1, 2, 4, 8]
    assert report.windows == 48
    first = report.results[0]
    assert 0 < first.loss < report.unigram_loss
    assert first.gain == 0
    assert first.loss_interval[0] < first.loss < first.loss_interval[1]
    for result in report.results:
        assert result.perplexity == pytest.approx(np.exp(result.loss))
        assert result.gain == pytest.approx(first.loss - result.loss)
    assert evaluate_run(trained.run_folder) == report

    folder = write_report(trained.run_folder, report)
    saved = json.loads((folder / "report.json").read_text())
    assert saved["results"][2]["loss"] == report.results[2].loss
    text = (folder / "report.md").read_text()
    assert headline(report) in text
    for row in table_rows(report):
        assert f"| {' | '.join(row)} |" in text
    assert all((folder / image).stat().st_size > 5_000 for image in re.findall(r"\]\((.*?\.png)\)", text))


def test_every_length_scores_the_same_targets_and_masks(trained, monkeypatch):
    seen: dict[int, list[tuple]] = {}

    class Recorder:
        def __call__(self, batch, layout):
            import torch

            rows = zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True)
            for inputs, labels in rows:
                where = [i for i, label in enumerate(labels) if label != IGNORED]
                block = inputs[where[0] : where[-1] + 1]
                seen.setdefault(len(inputs), []).append((tuple(block), tuple(labels[i] for i in where)))
            count = int((batch.labels != IGNORED).sum())
            return torch.zeros(count), torch.zeros(count, dtype=torch.bool)

    monkeypatch.setattr(context.MaskedLanguageModel, "__call__", Recorder())
    evaluate_run(trained.run_folder)
    assert set(seen) == {32, 64, 128, 256}
    assert seen[32] == seen[64] == seen[128] == seen[256]


def test_windows_lie_inside_documents_and_their_blocks_anywhere_in_them(trained):
    documents = [np.arange(n) for n in (100, 300, 64, 256)]
    windows = context._draw_windows(documents, 32, 256, 100, 1)
    assert {w.document for w in windows} == {1, 3}
    assert len(windows) == 9 + 8
    for window in windows:
        assert (np.diff(window.ids) == 1).all()
        assert len(window.ids) == 256
        assert 0 <= window.offset <= 224
    blocks = [int(w.ids[w.offset]) for w in windows if w.document == 1]
    assert sorted(blocks) == list(range(0, 288, 32))
    assert masking_rule(trained).is_special[:5].all()


def test_lengths_without_documents_are_skipped_with_the_reason(trained):
    report = evaluate_run(trained.run_folder, overrides=["evaluation.lengths=[1,2,64]"])
    assert [r.multiple for r in report.results] == [1, 2]
    assert report.skipped[64] == "0 documents of the test split have 2048 tokens"


def test_missing_runs_and_checkpoints_are_named(trained, tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        evaluate_run(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint of step 12345; there are: \d+"):
        evaluate_run(trained.run_folder, step=12345)
