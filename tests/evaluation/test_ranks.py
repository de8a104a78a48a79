"""The command on several real ranks, interrupted on the way."""

import json
import os
import signal
import time

import pytest

from tests.integration.test_whole_runs import diptych, start


def numbers(run, name) -> dict:
    report = json.loads((run / "evaluation" / name / "report.json").read_text())
    return {
        key: report[key] for key in ("results", "readings", "tasks", "attention", "pseudo", "ablations", "profiles")
    }


def approximately(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(approximately(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(approximately, one, other))
    return one == pytest.approx(other, abs=1e-5) if isinstance(one, float) else one == other


@pytest.mark.slow
def test_four_ranks_that_were_interrupted_give_the_numbers_of_one(trained, evaluated, tmp_path):
    command = ("evaluate", "context", str(trained.run_folder), "split=valid", "windows=32")
    folder = trained.run_folder / "evaluation" / "context-valid"
    diptych(tmp_path, *command)
    alone = numbers(trained.run_folder, "context-valid")
    for part in folder.glob("parts/*/*.npz"):
        part.unlink()
    (folder / "report.json").unlink()

    launcher = start(tmp_path, *command, "--nproc", "4")
    end = time.monotonic() + 100
    while not list(folder.glob("parts/*/*.npz")):
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.wait(timeout=60) in (0, 75)
    diptych(tmp_path, *command, "--nproc", "4")
    assert approximately(alone, numbers(trained.run_folder, "context-valid"))
    assert len(list((folder / "logs").iterdir())) == 4
