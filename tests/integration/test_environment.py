"""What happens around a run of the real program: the clock jumps, the working directory vanishes, /dev/shm is tiny."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.run.folder import RunFolder
from tests.integration.test_whole_runs import diptych, losses, project, wait_for

__all__ = ["project"]
ROOT = Path(__file__).parents[2]
JUMPING_CLOCK = """
import os, time
real = time.time
def jumping():
    path = os.environ["CLOCK"]
    return real() + (float(open(path).read() or 0) if os.path.exists(path) else 0)
time.time = jumping
"""


def train(folder: Path, *options: str, before: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-m", "launch.cli", "train", "tiny.yaml", "--nproc", "2", "--no-evaluate"]
    return subprocess.Popen(
        [*command, *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == code, printed
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_jumps_changes_nothing(project, tmp_path, hours):
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(JUMPING_CLOCK)
    clock = tmp_path / "clock"
    run = project / "runs" / "tiny"
    launcher = train(project, PYTHONPATH=f"{patch}:{ROOT}", CLOCK=str(clock))
    wait_for(lambda: len(losses(run)) >= 6, "steps")
    clock.write_text(str(3600 * hours))
    assert f"saved {list_checkpoints(run / 'checkpoints')[-1].name}" in finish(launcher)
    assert len(list_checkpoints(run / "checkpoints")) == 3
    assert [step for step, *_ in losses(run)] == list(range(1, losses(run)[-1][0] + 1))
    assert all(record > 0 for record in seconds_of_steps(run))
    status = RunFolder(run).status()
    assert (status.state, status.step) == ("done", losses(run)[-1][0])
    # The next start, in the past or the future of the last one, finds the run as it is.
    assert "is trained to its 30,000 tokens already" in finish(
        train(project, PYTHONPATH=f"{patch}:{ROOT}", CLOCK=str(clock))
    )


def seconds_of_steps(run: Path) -> list[float]:
    return [record["seconds"] for record in RunFolder(run).metrics() if "loss" in record]


@pytest.mark.slow
def test_a_working_directory_that_vanishes_changes_nothing(project, tmp_path):
    diptych(project, "data", "build", "tiny.yaml")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(project / "tiny.yaml", elsewhere)
    run = project / "runs" / "tiny"
    launcher = train(elsewhere, f"runs={project / 'runs'}", f"corpus.path={project / 'corpus'}", "corpus.sources=[]")
    wait_for(lambda: len(losses(run)) >= 6, "steps")
    shutil.rmtree(elsewhere)
    finish(launcher)
    assert RunFolder(run).status().state == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "code", "answer"),
    [("64k", 2, "loader workers cannot be started: "), ("1m", 1, "DataLoader worker (pid(s) ")],
)
def test_a_tiny_shared_memory_is_named_and_0_workers_need_none(project, size, code, answer):
    mount = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this container may not mount file systems")
    options = ("data.sequence_length=64", "training.batch_size=1024", "training.tokens=200_000")
    printed = finish(train(project, *options, before=tuple(mount)), code)
    assert answer in printed
    assert "/dev/shm, through which workers hand their rows over, holds " in printed
    assert "0 needs none" in printed
    finish(train(project, *options, "data.workers=0", before=tuple(mount)))
