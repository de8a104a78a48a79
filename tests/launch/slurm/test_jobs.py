"""The scripts of jobs, with Slurm's commands replaced: what a training job writes down, and whether it comes back."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from launch.slurm.in_job import allocation_overrides, prepare_run
from launch.slurm.submission import new_submission
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder


@pytest.fixture
def job(make_config, fake_slurm):
    """Run a training job whose ranks do what `shell` says; its exit code, and why it ended."""
    run = RunFolder.of(make_config())
    run.path.mkdir(parents=True)
    folder, _ = new_submission(run.submissions, make_config())
    fake_slurm.queue()
    (fake_slurm.folder / "queue").write_text("0 RUNNING\n")

    def start(shell: str, restart: int = 0) -> tuple[int, str]:
        fake_slurm.srun_does(f'run="{run}" start="{folder}/job-7-start-{restart}"\n{shell}\n')
        variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}
        done = subprocess.run(
            ["bash", "-c", f'submission="{folder}"; . "$submission/train.sh"'],
            env={**os.environ, **variables, "SLURM_RESTART_COUNT": str(restart)},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        events = [json.loads(line) for line in Path(run.jobs_file).read_text().splitlines()]
        assert events[-1]["event"] == "end", done.stderr
        return done.returncode, events[-1]["why"]

    return start


SAVED = ': >"$start/resume-me"'
NEW_CHECKPOINT = 'mkdir -p "$run/checkpoints/step-1"; : >"$run/checkpoints/step-1/MANIFEST.json"'


def test_a_job_that_was_asked_to_save_goes_back_into_the_queue(job, fake_slurm):
    assert job(SAVED) == (75, "saved on request; back into the queue")
    assert fake_slurm.calls("scontrol")[-1] == "scontrol requeue 7"


@pytest.mark.parametrize("ranks", [SAVED, f"{NEW_CHECKPOINT}; exit 1"])
def test_a_run_that_is_cancelled_while_it_runs_does_not_come_back(job, fake_slurm, ranks):
    assert job(f': >"$run/cancelled"; {ranks}') == (75, "cancelled")
    assert not any("requeue" in call for call in fake_slurm.calls("scontrol"))


def test_a_run_that_is_cancelled_before_it_starts_starts_no_ranks(job, fake_slurm):
    job(f': >"$run/cancelled"; {SAVED}')
    before = len(fake_slurm.calls("srun"))
    assert job(SAVED, restart=1) == (75, "cancelled")
    assert len(fake_slurm.calls("srun")) == before


def test_a_failure_is_repeated_only_after_a_new_checkpoint(job, fake_slurm):
    code, why = job("exit 1")
    assert (code, why.split(";")[0]) == (1, "srun ended with 1, before the first new checkpoint")
    assert job(f"{NEW_CHECKPOINT}; exit 1") == (75, "srun ended with 1; back into the queue")


def test_a_job_of_the_users_own_script_is_prepared_at_its_first_start_and_found_at_later_ones(make_config, fake_slurm):
    config = make_config()
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    first = prepare_run(config, Console(), environment=job)
    assert first == config.run_folder / "submissions" / "001"
    assert prepare_run(config, Console(), environment={**job, "SLURM_RESTART_COUNT": "1"}) == first
    fake_slurm.queue(job_7="RUNNING")
    with pytest.raises(UserError, match="run is running already, as job 7"):
        prepare_run(config, Console(), environment={**job, "SLURM_JOB_ID": "8"})
    assert "cluster.nodes=2" in allocation_overrides(job)
    with pytest.raises(UserError, match="this is none: sbatch slurm/train.sbatch CONFIG"):
        prepare_run(config, Console(), environment={})
