"""Logs, ends and cancellations of runs, as far as they need no Slurm."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from launch import control, run_list
from launch.control import cancel_runs, ranks_of, resume_run
from launch.logs import show_log
from launch.run_list import list_runs, with_slurm
from launch.slurm.queries import JobState, SlurmSilentError
from launch.slurm.starts import last_end, read_starts
from launch.slurm.submission import Submission
from pretrain.config.load import to_yaml
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.training.ranks import interface_towards

HOLD = """
import sys, time
from pathlib import Path
from pretrain.run.folder import RunFolder
from pretrain.run.lock import run_lock
with run_lock(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: first\n")
    return folder


def record(run: Path, *events: dict) -> None:
    with (run / "jobs.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"time": 1, "job": "7", "nodes": "n1", "ranks": "2", **event}) + "\n" for event in events
        )


def test_why_a_job_ended_is_told_also_while_the_next_start_is_at_work(run):
    record(run, {"event": "start", "restart": 0}, {"event": "end", "restart": 0, "code": "75", "why": "saved"})
    assert last_end(RunFolder(run)) == "saved"
    record(run, {"event": "start", "restart": 1})
    assert last_end(RunFolder(run)) == "saved"
    record(run, {"event": "start", "restart": 2})
    assert last_end(RunFolder(run)) == "ended from outside on n1: a lost node, preemption or scancel"
    record(run, {"event": "end", "restart": 2, "code": "0", "why": "done"})
    assert last_end(RunFolder(run)) is None
    (run / "jobs.jsonl").open("a").write('{"time": 1, "eve')
    assert [(start.restart, start.exit_code, start.ranks) for start in read_starts(RunFolder(run))] == [
        (0, 75, 2),
        (1, None, 2),
        (2, 0, 2),
    ]


def test_a_log_is_that_of_the_newest_start_and_of_the_rank_asked_for(run):
    for attempt, rank in ((1, 0), (2, 0), (2, 1)):
        log = run / "logs" / f"attempt-{attempt:04d}" / f"rank-{rank:04d}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"attempt {attempt}, rank {rank}\n")
    shown: list[str] = []
    show_log(RunFolder(run), 1, False, shown.append)
    show_log(RunFolder(run), 0, False, shown.append)
    assert shown == ["attempt 2, rank 1\n", "attempt 2, rank 0\n"]
    with pytest.raises(UserError, match="no log of rank 5; there are rank-0000, rank-0001"):
        show_log(RunFolder(run), 5, False)


def test_a_start_whose_ranks_never_met_shows_what_they_printed(run):
    log = run / "logs" / "attempt-0001" / "rank-0000.log"
    early = run / "submissions" / "001" / "job-7-start-1" / "rank-0000.log"
    for path, text in ((log, "of attempt 1\n"), (early, "cannot meet\n")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    shown: list[str] = []
    show_log(RunFolder(run), 0, False, shown.append)
    assert shown == ["cannot meet\n"]
    early.write_text(f"this rank's log: {log}\n")
    show_log(RunFolder(run), 0, False, shown.append)
    assert shown[1:] == ["of attempt 1\n"]


def test_following_ends_with_the_run(run, monkeypatch):
    monkeypatch.setattr("launch.logs.QUIET_S", 0.1)
    monkeypatch.setattr("launch.logs.FOLLOW_POLL_S", 0.05)
    log = run / "logs" / "attempt-0001" / "rank-0000.log"
    log.parent.mkdir(parents=True)
    log.write_text("one\n")
    (run / "status.json").write_text(json.dumps({"state": "done", "heartbeat": time.time()}))
    shown: list[str] = []
    show_log(RunFolder(run), 0, True, shown.append)
    assert shown == ["one\n"]


@pytest.mark.parametrize(
    ("why", "is_over"),
    [
        ("cancelled", True),
        ("saved on request; it was started again 3 times already (cluster.max_requeues)", True),
        ("saved on request; back into the queue", False),
        ("saved on request; ended by Slurm (PREEMPTED)", False),
        (None, False),
    ],
)
def test_following_goes_on_while_a_job_will_and_no_longer(run, monkeypatch, why, is_over):
    monkeypatch.setattr("launch.logs.QUIET_S", 0.0)
    monkeypatch.setattr("launch.logs.FOLLOW_POLL_S", 0.0)
    naps = []

    def nap(_: float) -> None:
        """The next start comes while nobody looks; that one ends for good."""
        naps.append(1)
        log = run / "logs" / "attempt-0002" / "rank-0000.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("two\n")
        record(run, {"event": "start", "restart": 1}, {"event": "end", "restart": 1, "code": "75", "why": "cancelled"})

    monkeypatch.setattr("launch.logs.time.sleep", nap)
    log = run / "logs" / "attempt-0001" / "rank-0000.log"
    log.parent.mkdir(parents=True)
    log.write_text("one\n")
    (run / "status.json").write_text(json.dumps({"state": "interrupted", "heartbeat": 1}))
    record(run, {"event": "start", "restart": 0})
    if why:
        record(run, {"event": "end", "restart": 0, "code": "75", "why": why})
    shown: list[str] = []
    show_log(RunFolder(run), 0, True, shown.append)
    assert shown == (["one\n"] if is_over else ["one\n", f"--- {run}/logs/attempt-0002/rank-0000.log\n", "two\n"])


def test_cancelling_a_run_of_this_machine_signals_its_launcher(run):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    # Of a sweep, those members that are at work.
    cancel_runs([RunFolder(run), RunFolder(run.with_name("waiting"))], Console())
    assert holder.wait(timeout=10) == -signal.SIGTERM


def submitted(runs: Path, name: str, train: str) -> RunFolder:
    """A run whose training is that job, and its evaluation the tenfold."""
    folder = runs / name / "submissions" / "001"
    folder.mkdir(parents=True)
    Submission(1.0, "abc", {"train": train, "evaluate": f"{train}0"}).write(folder)
    return RunFolder(runs / name)


def test_a_job_that_runs_is_told_to_save_and_not_to_come_back_and_its_evaluation_is_taken_out(tmp_path, fake_slurm):
    run = submitted(tmp_path, "mine", "7")
    fake_slurm.queue(job_7="RUNNING", job_70="PENDING")
    cancel_runs([run], Console())
    assert fake_slurm.calls("scancel") == ["scancel --signal=USR2 7", "scancel 70"]
    assert run.cancelled.exists()


def test_a_job_that_waits_is_taken_out_of_the_queue_and_one_that_has_ended_is_left(tmp_path, fake_slurm):
    run = submitted(tmp_path, "mine", "7")
    fake_slurm.queue(job_7="PENDING", job_70="COMPLETED")
    cancel_runs([run], Console())
    assert fake_slurm.calls("scancel") == ["scancel 7"]


def test_of_a_sweep_the_last_is_cancelled_first(tmp_path, fake_slurm):
    """Else a member that waits would begin on the nodes of one that has ended."""
    runs = [submitted(tmp_path, f"member{number}", str(number)) for number in (1, 2, 3)]
    fake_slurm.queue(job_1="RUNNING", job_2="PENDING", job_3="PENDING")
    cancel_runs(runs, Console())
    assert fake_slurm.calls("scancel") == ["scancel 3", "scancel 2", "scancel --signal=USR2 1"]


def test_a_run_that_is_not_at_work_cannot_be_cancelled(run):
    with pytest.raises(UserError, match="first is neither queued nor running"):
        cancel_runs([RunFolder(run)], Console())


def test_a_run_is_resumed_on_as_many_ranks_as_it_had(make_config, monkeypatch):
    config = make_config()
    config.run_folder.mkdir(parents=True)
    monkeypatch.setattr("launch.control.num_gpus", lambda: 0)
    assert ranks_of(RunFolder(config.run_folder), config) == 1
    (config.run_folder / "environment.json").write_text('{"world_size": 4}')
    assert ranks_of(RunFolder(config.run_folder), config) == 4


def test_resuming_here_trains_the_saved_config_and_resuming_a_job_needs_slurm(make_config, monkeypatch):
    config = make_config()
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "config.yaml").write_text(to_yaml(config))
    (config.run_folder / "environment.json").write_text('{"world_size": 2}')
    monkeypatch.setattr("launch.control.num_gpus", lambda: 0)
    monkeypatch.setenv("PATH", "/nowhere")
    started = []
    monkeypatch.setattr(control, "train_and_evaluate", lambda config, ranks, _: started.append((config, ranks)) or 75)
    assert resume_run(RunFolder(config.run_folder), Console()) == 75
    assert started == [(config, 2)]
    folder = config.run_folder / "submissions" / "001"
    folder.mkdir(parents=True)
    Submission(1.0, "abc", {"train": "7"}).write(folder)
    with pytest.raises(UserError, match="was submitted to Slurm, and there is no sbatch on this machine"):
        resume_run(RunFolder(config.run_folder), Console())
    assert len(started) == 1


@pytest.mark.parametrize(
    ("states", "slurm"),
    [
        ({"7": JobState("RUNNING", "", "diptych abc")}, "7 running"),
        ({"7": JobState("PENDING", "Resources", "diptych abc")}, "7 pending (Resources)"),
        ({"7": JobState("COMPLETED"), "8": JobState("PENDING", "Priority")}, "8 evaluation pending (Priority)"),
        ({"7": JobState("FAILED"), "8": JobState("PENDING", "Dependency")}, "7 failed"),
        ({"7": JobState("RUNNING", "", "somebody else's")}, "forgotten"),
        ({}, "forgotten"),
    ],
)
def test_the_list_says_what_slurm_says_of_the_job_that_counts(run, monkeypatch, states, slurm):
    folder = run / "submissions" / "001"
    folder.mkdir(parents=True)
    Submission(1.0, "abc", {"train": "7", "evaluate": "8"}).write(folder)
    monkeypatch.setattr(run_list, "job_states", lambda _: states)
    (row,), warning = with_slurm(list_runs(run.parent))
    assert (row.slurm, warning) == (slurm, None)

    def silent(_: object) -> dict[str, JobState]:
        raise SlurmSilentError("it does not answer")

    monkeypatch.setattr(run_list, "job_states", silent)
    (row,), warning = with_slurm(list_runs(run.parent))
    assert row.slurm == "no answer"
    assert "heartbeats" in str(warning)


def test_the_interface_towards_a_host_is_the_one_that_leads_there():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no-such-host.invalid") is None
