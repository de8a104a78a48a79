"""Faults of the real program on real ranks: a rank that stops, signals at awkward moments, secrets in plain sight."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.verify import verify_checkpoint
from pretrain.run.folder import RunFolder
from tests.integration.test_whole_runs import diptych, living_ranks, losses, project, start, wait_for

__all__ = ["project"]

QUICK = ("--nproc", "2", "--no-evaluate", "evaluation.windows=8")


def rank_number(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(v for v in variables if v.startswith(b"RANK=")).removeprefix(b"RANK="))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_the_run_ends_to_be_resumed(project, victim):
    run = project / "runs" / "tiny"
    command = ("train", "tiny.yaml", "supervision.silence_s=4", "training.validate_every=1000", *QUICK)
    launcher = start(project, *command)
    wait_for(lambda: len(losses(run)) >= 6, "steps")
    pid = next(pid for pid in living_ranks(run) if rank_number(pid) == victim)
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    assert launcher.wait(timeout=40) == 75
    assert time.monotonic() - stopped < 4 + 10
    assert not living_ranks(run)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "interrupted"
    assert f"1 rank silent: rank {victim} (process {pid} on {os.uname().nodename}) is silent since" in status["message"]
    assert "its process is stopped (SIGSTOP)" in status["message"]
    logs = [(run / "logs" / "attempt-0001" / f"rank-{rank:04d}.log").read_text() for rank in range(2)]
    assert f"rank {victim} (process {pid}" in logs[1 - victim]
    assert all("trainer.py" in log and 'File "' in log for log in logs), "a stack trace of every rank"
    assert "resuming" in diptych(project, *command)


def signal_ranks(run: Path, number: signal.Signals, times: int = 1) -> None:
    """As Slurm does: to every rank itself."""
    for _ in range(times):
        for pid in living_ranks(run):
            os.kill(pid, number)


def state_of(run: Path) -> str | None:
    status = RunFolder(run).status()
    return status and status.state


@pytest.mark.slow
def test_a_signal_at_an_awkward_moment_still_saves_and_asks_to_be_resumed(project):
    run = project / "runs" / "tiny"
    command = ("train", "tiny.yaml", "training.validation_rows=2000", "training.tokens=60_000")
    command += ("training.micro_batch_size=1", *QUICK)  # many batches in a validation

    launcher = start(project, *command)  # before the first step: nothing to save
    wait_for(lambda: len(living_ranks(run)) == 2, "ranks")
    time.sleep(1.0)
    signal_ranks(run, signal.SIGUSR1, times=2)
    assert launcher.wait(timeout=40) == 75
    assert list_checkpoints(run / "checkpoints") == []

    launcher = start(project, *command)  # in a validation, twice in a row
    wait_for(lambda: state_of(run) == "validating", "validation")
    signal_ranks(run, signal.SIGUSR2, times=2)
    asked = time.monotonic()
    assert launcher.wait(timeout=40) == 75
    assert time.monotonic() - asked < 5
    assert state_of(run) == "interrupted"
    assert list_checkpoints(run / "checkpoints")[-1].name == "step-00000020"
    assert "validation left for the next start" in " ".join(RunFolder(run).status().events)

    launcher = start(project, *command)  # in a save; the validation that was left is made up for
    wait_for(lambda: list((run / "checkpoints").glob(".step-*.tmp")), "save")
    signal_ranks(run, signal.SIGTERM)
    assert launcher.wait(timeout=40) == 75
    last = list_checkpoints(run / "checkpoints")[-1]
    assert verify_checkpoint(last) == []
    records = RunFolder(run).metrics()
    validated = [record["step"] for record in records if "validation_loss" in record]
    assert validated[0] == 20
    assert validated == list(range(20, validated[-1] + 1, 20))
    assert [step for step, *_ in losses(run)] == list(range(1, int(last.name[5:]) + 1))
    assert not living_ranks(run)


@pytest.mark.slow
def test_planted_secrets_reach_no_file_of_a_run_and_the_folder_is_private(project, monkeypatch):
    diptych(project, "data", "build", "tiny.yaml")
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(project / "corpus")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        port = server.stdout.readline().split(b" port ")[1].split()[0].decode()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t-of-aws")
        monkeypatch.setenv("HF_TOKEN", "s3cr3t-of-hf")
        # A server that takes no password: the secret stands in the path, and is known as one by the variable.
        url = f"http://127.0.0.1:{port}/s3cr3t-of-hf/.."
        options = ("corpus.path=fetched", "corpus.sources=[]", f"corpus.url={url}", "data.on_corrupt=error")
        previous = os.umask(0)
        try:
            printed = diptych(project, "train", "tiny.yaml", *options, "training.tokens=3000", *QUICK)
        finally:
            os.umask(previous)
    finally:
        server.kill()
        server.communicate()
    run = project / "runs" / "tiny"
    assert "s3cr3t" not in printed
    for path in run.rglob("*"):
        if path.is_file():
            assert b"s3cr3t" not in path.read_bytes(), path
    assert "***" in (run / "config.yaml").read_text()
    assert run.stat().st_mode & 0o777 == 0o700
