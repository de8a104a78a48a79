"""The command on several real ranks, interrupted on the way."""

import json
import os
import shutil
import signal
import time

import pytest

from pretrain.run.folder import RunFolder
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


@pytest.mark.slow
def test_a_recalibration_is_a_run_of_its_own_that_goes_on_from_the_checkpoint(trained, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(trained.run_folder, run)
    command = ("evaluate", "context", str(run), "--lengths", "1x,2x,4x", "windows=32", "--recalibrate", "6k")
    assert "recalibrating for 6,000 tokens" in diptych(tmp_path, *command)
    (folder,) = (run / "evaluation").glob("recalibrated-*")
    records = [r for r in RunFolder(folder).metrics() if "loss" in r]
    before = [r for r in RunFolder(run).metrics() if "loss" in r][-1]
    assert records[0]["step"] == before["step"] + 1
    assert records[-1]["tokens"] >= before["tokens"] + 6000
    report = json.loads((run / "evaluation" / "context" / "report.json").read_text())
    (recalibration,) = report["recalibrations"]
    assert (recalibration["tokens"], recalibration["length"]) == (6000, 128)
    results = {r["multiple"]: r for r in recalibration["results"]}
    plain = {r["multiple"]: r for r in report["results"]}
    assert results[4]["loss"] != plain[4]["loss"]
    assert results[4]["gain"] == pytest.approx(plain[1]["loss"] - results[4]["loss"])
    assert results[1]["regression"] == pytest.approx(results[1]["loss"] - plain[1]["loss"])
    assert "recalibrating" not in diptych(tmp_path, *command)
