"""The attempt fence and the run lock: of two copies of a run, one trains."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.errors import UserError
from pretrain.run import lock
from pretrain.run.attempt import Attempt, SupersededError, newest_attempt, take_attempt
from pretrain.run.folder import RunFolder
from pretrain.run.lock import Holder, holder_of, is_locked, run_lock, try_flock
from pretrain.run.opening import open_run_folder
from pretrain.training.cost.flops import FlopsPerToken
from pretrain.training.monitor.metrics import Metrics
from pretrain.training.trainer import Trainer
from tests.ranks import run_on_ranks, trainer_of


def take_some(folder: Path, results: "multiprocessing.Queue[int]") -> None:
    for _ in range(25):
        results.put(take_attempt(RunFolder(folder)).number)


def test_every_start_takes_a_number_of_its_own_however_many_start_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    takers = [context.Process(target=take_some, args=(tmp_path, results)) for _ in range(4)]
    for taker in takers:
        taker.start()
    taken = [results.get(timeout=20) for _ in range(100)]
    for taker in takers:
        taker.join()
    assert sorted(taken) == list(range(1, 101))
    assert newest_attempt(RunFolder(tmp_path)) == 100


def test_an_older_attempt_is_told_who_has_taken_over(tmp_path):
    first = take_attempt(RunFolder(tmp_path))
    first.check()
    second = take_attempt(RunFolder(tmp_path))
    second.check()
    with pytest.raises(SupersededError, match=f"attempt 2 has taken over {tmp_path}; this is attempt 1"):
        first.check()
    who = json.loads((tmp_path / "attempts" / "0002.json").read_text())
    assert (who["pid"], who["host"]) == (os.getpid(), os.uname().nodename)


def test_no_two_attempts_write_to_one_log(tmp_path):
    logs = {Attempt(RunFolder(tmp_path), number).log(rank) for number in (1, 2) for rank in (0, 1)}
    assert len(logs) == 4


def train_until_taken_over(rank, config, world_size, at_step):
    """Train; before step `at_step` + 1, another start takes the run, as it would on another node."""

    class Overtaken(Trainer):
        def take(self, rows, totals):
            if rank == 0 and self.state.step == at_step:
                take_attempt(RunFolder(config.run_folder))
            super().take(rows, totals)

    trainer = trainer_of(config, rank, world_size, trainer=Overtaken)
    try:
        return trainer.fit()
    except SupersededError as end:
        return str(end), trainer.state.step


def train_both_until_taken_over(rank, cases, world_size):
    return [train_until_taken_over(rank, config, world_size, at_step) for config, at_step in cases]


@pytest.mark.slow
def test_an_attempt_that_was_taken_over_writes_nothing_more_and_ends_on_all_ranks(make_config, manifest, tmp_path):
    saves, logs = {"checkpoint": {"every": 5}}, {"checkpoint": {"every": 100}}
    cases = [
        (make_config("save", training={"log_every": 100}, **saves), 13),
        (make_config("log", training={"log_every": 4}, **logs), 9),
    ]
    for config, _ in cases:
        open_run_folder(config, manifest)
    for ends in run_on_ranks(train_both_until_taken_over, 2, tmp_path / "ranks", cases, 2):
        assert [step for _, step in ends] == [15, 12]
        assert all("attempt 2 has taken over" in text for text, _ in ends)
    for (config, at_step), recorded, saved in zip(cases, (10, 8), (10, None), strict=True):
        folder = config.run_folder
        assert max(record["step"] for record in RunFolder(folder).metrics()) == recorded
        checkpoints = list_checkpoints(folder / "checkpoints")
        assert (int(checkpoints[-1].name[5:]) if checkpoints else None) == saved
        assert not list((folder / "checkpoints").glob(".step-*"))
        assert RunFolder(folder).status().step <= at_step


def test_what_an_older_attempt_still_writes_does_not_reach_the_metrics_of_the_next(tmp_path):
    flops = FlopsPerToken(0, 0, 0, 0)
    old = Metrics(RunFolder(tmp_path), 0, flops, None, 0)
    old.validation(1, 10, 1.0, 0.5)
    new = Metrics(RunFolder(tmp_path), 1, flops, None, 0)
    old.validation(2, 20, 666.0, 0.5)
    new.validation(2, 20, 1.0, 0.5)
    for metrics in (old, new):
        metrics.close()
    assert [record["validation_loss"] for record in RunFolder(tmp_path).metrics()] == [1.0, 1.0]


# ------------------------------------------------------------------------------------------------------ the lock


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder whose lock is watched for a short time only."""
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "OBSERVE_S", 0.6)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return RunFolder(tmp_path / "runs" / "run")


def leave_lock(run: RunFolder, **who) -> None:
    """The lock as a process leaves it that was killed."""
    run.path.parent.mkdir(exist_ok=True)
    holder = replace(Holder.this_process(), pid=4242, host="elsewhere", **who)
    run.lock_file.write_text(json.dumps(vars(holder)))


def seconds_to_take(run: RunFolder) -> float:
    started = time.monotonic()
    with run_lock(run):
        return time.monotonic() - started


def test_a_second_copy_on_the_same_machine_is_refused_at_once(run):
    with run_lock(run):
        assert is_locked(run)
        with pytest.raises(UserError, match=f"is being trained already, by process {os.getpid()} on"), run_lock(run):
            pass
    assert not is_locked(run)
    assert seconds_to_take(run) < 0.3


def test_a_lock_of_a_killed_process_of_this_machine_does_not_delay_the_next_start(run):
    leave_lock(run)
    assert seconds_to_take(run) < 0.3


def test_a_silent_lock_of_another_machine_delays_the_next_start_by_the_time_of_watching(run):
    leave_lock(run, machine="another")
    assert not is_locked(run)
    assert 0.5 < seconds_to_take(run) < 1.2


def test_a_beating_lock_of_another_machine_is_refused_whatever_the_clocks_say(run):
    leave_lock(run, machine="another", slurm_job="77")
    ended = threading.Event()

    def beat() -> None:
        clock = 1_000_000  # of a machine that thinks it is 1970
        while not ended.wait(0.1):
            clock += 1
            os.utime(run.lock_file, (clock, clock))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert is_locked(run)
        with pytest.raises(UserError, match=r"process 4242 on elsewhere \(Slurm job 77\)"), run_lock(run):
            pass
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(("restarts", "at_once"), [("1", True), ("0", False)])
def test_a_requeued_job_gets_through_at_once_on_another_node(run, monkeypatch, restarts, at_once):
    leave_lock(run, machine="another", slurm_job="77", slurm_restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    assert (seconds_to_take(run) < 0.3) == at_once


def test_a_holder_that_was_taken_over_does_not_wipe_the_lock_of_the_next(run, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    old = run_lock(run)
    old.__enter__()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with run_lock(run):
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        old.__exit__(None, None, None)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        assert json.loads(run.lock_file.read_text())["slurm_restarts"] == 1


def test_a_killed_holder_leaves_nothing_that_keeps_others_out(run):
    code = "import sys, time; from pathlib import Path; from pretrain.run.folder import RunFolder\n"
    code += "from pretrain.run.lock import run_lock\n"
    code += "with run_lock(RunFolder(Path(sys.argv[1]))): print('held', flush=True); time.sleep(60)"
    root = Path(lock.__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], cwd=root, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    assert is_locked(run)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert seconds_to_take(run) < 0.3


def test_a_clean_end_leaves_no_holder_behind_whatever_was_in_the_file_before(run):
    for name in ("a much longer name of a host than any other", "b"):
        leave_lock(run, machine=name)
        with run_lock(run):
            assert Holder(**json.loads(run.lock_file.read_text())) == Holder.this_process()
        assert run.lock_file.read_text() == ""
        assert holder_of(run) is None


def test_whoever_asks_whether_a_run_is_held_does_not_keep_others_from_it(run):
    leave_lock(run, machine="another")
    asking = threading.Thread(target=is_locked, args=(run,))
    asking.start()
    time.sleep(0.2)  # it watches for 0.6 s
    with run.lock_file.open("r+") as file:
        assert try_flock(file)
    assert asking.is_alive()
    asking.join()


@pytest.mark.parametrize("is_beating", [False, True])
def test_where_the_file_system_has_no_locks_the_heartbeat_decides(run, monkeypatch, is_beating):
    """A crash must not keep the run for ever."""

    def without_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    leave_lock(run)
    ended = threading.Event()
    beating = threading.Thread(target=lock._beat, args=(run.lock_file, ended))
    if is_beating:
        beating.start()
        with pytest.raises(UserError, match="is being trained already"), run_lock(run):
            pass
        ended.set()
        beating.join()
    assert 0.5 < seconds_to_take(run) < 1.5
