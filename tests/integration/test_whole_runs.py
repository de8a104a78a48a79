"""The program as a user runs it: from raw files to a report, killed on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.run.folder import RunFolder
from tests.conftest import write_texts

SHARED = Path(os.environ.get("DIPTYCH_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def diptych(folder: Path, *arguments: str, check: int = 0, timeout: float = 280) -> str:
    """Run the command line in `folder`; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for(condition, what: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} within {seconds} s"
        time.sleep(0.05)


def living_ranks(run: Path) -> list[int]:
    """Processes whose command line names the run folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(run).encode() in words and b"pretrain.training" in words:
            found.append(int(process.name))
    return found


def losses(run: Path) -> list[tuple]:
    records = [r for r in RunFolder(run).metrics() if "loss" in r]
    return [(r["step"], r["loss"], r["rows_checksum"]) for r in records]


@pytest.fixture
def project(tmp_path):
    """A working directory with a space in its name, raw text and a config that trains in seconds."""
    folder = tmp_path / "my project"
    write_texts(folder / "raw", 200)
    (folder / "tiny.yaml").write_text(
        "corpus: {path: corpus, sources: [{path: raw}], tokenizer: {vocab_size: 120, byte_fallback: false},\n"
        "  min_train_shards: 16, splits: {valid: 0.1, test: 0.1}}\n"
        "data: {sequence_length: 32, streams: 16, workers: 1}\n"
        "model: {hidden_size: 32, num_layers: 2, num_heads: 2}\n"
        "training: {tokens: 30_000, batch_size: 16, validation_rows: 32, validate_every: 20, log_every: 2}\n"
        "checkpoint: {every: 5, keep_last: 3}\n"
    )
    return folder


@pytest.mark.slow
def test_a_run_whose_processes_are_killed_twice_ends_like_an_unbroken_one(project):
    whole = diptych(project, "train", "tiny.yaml", "name=whole", "--nproc", "2")
    assert "Context extension of whole" in whole
    run = project / "runs" / "broken"
    command = ("train", "tiny.yaml", "name=broken", "--nproc", "2")

    launcher = start(project, *command)
    wait_for(lambda: len(list_checkpoints(run / "checkpoints")) >= 2, "checkpoint")
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not living_ranks(run), "end of the ranks", 5)

    launcher = start(project, *command)
    seen = len(losses(run))
    wait_for(lambda: len(losses(run)) > seen + 8, "progress after the resume")
    os.kill(living_ranks(run)[-1], signal.SIGKILL)
    assert launcher.wait(timeout=20) == 1
    assert not living_ranks(run)

    resumed = diptych(project, *command)
    assert "resuming" in resumed
    assert losses(run) == losses(project / "runs" / "whole")
    reports = [
        json.loads((project / "runs" / name / "evaluation/context/report.json").read_text())
        for name in ("whole", "broken")
    ]
    assert reports[0]["results"] == reports[1]["results"]


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes(project):
    run = project / "runs" / "tiny"
    launcher = start(project, "train", "tiny.yaml", "--nproc", "2", "--no-evaluate")
    wait_for(lambda: len(losses(run)) >= 4, "steps")
    os.kill(launcher.pid, signal.SIGINT)
    assert launcher.wait(timeout=60) == 75
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    saved = list_checkpoints(run / "checkpoints")[-1]
    assert "resuming" in diptych(project, "train", "tiny.yaml", "--nproc", "2", "--no-evaluate")
    assert saved.name in (run / "logs" / "attempt-0002" / "rank-0000.log").read_text()
    assert [step for step, *_ in losses(run)] == list(range(1, len(losses(run)) + 1))
    assert "tiny" in diptych(project, "runs")


@pytest.mark.slow
def test_a_built_wheel_works_outside_the_checkout(tmp_path):
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)],
        check=True,
    )
    (wheel,) = tmp_path.glob("diptych-*.whl")
    target = tmp_path / "a place"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)],
        check=True,
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import launch.cli; print(launch.cli.__file__); launch.cli.main()",
            "config",
            "show",
            "books",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(target) in done.stdout
    assert "name: books" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no folder of real data at {SHARED}; set DIPTYCH_DATA")
@pytest.mark.parametrize(("config", "margin"), [("books", 0.25), ("proteins", 0.005)])
def test_real_data_is_learned_after_a_kill(tmp_path, config, margin):
    run = tmp_path / "runs" / config
    command = [
        "train",
        config,
        "training.tokens=250_000",
        "training.batch_size=16",
        "checkpoint.every=5",
        "--nproc",
        "2",
    ]
    command += ["model.hidden_size=128", "model.num_heads=2", "model.num_layers=3", "optimizer.learning_rate=3e-3"]
    command += [
        "data.streams=16",
        "training.validate_every=1000",
        "training.validation_rows=128",
        "evaluation.windows=16",
        "evaluation.lengths=[1,2]",
        "evaluation.reading_windows=2",
    ]
    os.environ["DIPTYCH_DATA"] = str(SHARED)
    launcher = start(tmp_path, *command)
    wait_for(lambda: len(list_checkpoints(run / "checkpoints")) >= 2, "checkpoint")
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    wait_for(lambda: not living_ranks(run), "end of the ranks", 5)
    printed = diptych(tmp_path, *command)
    assert "resuming" in printed
    report = json.loads((run / "evaluation/context/report.json").read_text())
    validation = [r["validation_loss"] for r in RunFolder(run).metrics() if "validation_loss" in r]
    assert validation[-1] < report["unigram_entropy"] - margin, (validation, report["unigram_entropy"])
