"""Faults of the real program on real ranks: a rank that stops, signals at awkward moments, secrets in plain sight."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

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
