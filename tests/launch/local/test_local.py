"""The supervision of local ranks, with small real processes in the place of training ranks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import ranks, training
from launch.local.supervisor import PATIENCE, Patience
from pretrain.config.run import RunConfig
from tests.launch.local.recorder import Recorder

RANK = """
import ctypes, json, os, signal, subprocess, sys, time
from pathlib import Path
run_folder, plans = Path(sys.argv[1]), json.loads(os.environ["PLANS"])
rank = int(os.environ["RANK"])
plan = plans[rank]
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(os.environ["DIPTYCH_LAUNCHER_PID"]):
    os._exit(1)
if plan.get("child"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (run_folder / f"child-{rank}").write_text(str(child.pid))
if plan.get("on_term") == "save":
    signal.signal(signal.SIGTERM, lambda *_: (print("saving"), sys.exit(75)))
elif plan.get("on_term") == "ignore":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
for line in plan.get("say", []):
    print(line)
for status in plan.get("status", []):
    temporary = run_folder / "status.tmp"
    attempt = int(os.environ["DIPTYCH_ATTEMPT"])
    temporary.write_text(json.dumps({"heartbeat": time.time(), "attempt": attempt, **status}))
    temporary.replace(run_folder / "status.json")
    time.sleep(0.1)
(run_folder / f"pid-{rank}").write_text(str(os.getpid()))
time.sleep(plan.get("sleep", 0))
if "signal" in plan:
    os.kill(os.getpid(), plan["signal"])
sys.exit(plan.get("exit", 0))
"""


def make_config(folder: Path) -> RunConfig:
    return RunConfig.model_validate({"name": "run", "runs": folder / "my runs", "corpus": {"path": folder / "corpus"}})


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Launch ranks that follow `plans`, in this process; returns the exit code, the display and the run folder."""
    config = make_config(tmp_path)
    config.run_folder.mkdir(parents=True)

    def run(*plans: dict, **patience: float) -> tuple[int, Recorder, Path]:
        monkeypatch.setenv("PLANS", json.dumps(plans))
        monkeypatch.setattr(training, "rank_command", lambda folder: [sys.executable, "-c", RANK, str(folder)])
        display = Recorder()
        asked = Patience(**{"poll_s": 0.02, "failure_s": 0.5, **patience})
        return training.launch_local(config, len(plans), display, None, asked), display, config.run_folder

    yield run
    assert running_pids(config.run_folder) == []


def running_pids(run_folder: Path) -> list[int]:
    """Ranks and their children that are still running."""
    files = [*run_folder.glob("pid-*"), *run_folder.glob("child-*")]
    return [pid for pid in (int(file.read_text() or 0) for file in files) if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ how it ends


def test_exit_code_is_0_when_every_rank_is_done(launch):
    exit_code, display, run_folder = launch({"say": ["hello from 0"]}, {"say": ["hello from 1"]})
    assert exit_code == 0
    assert display.messages == []
    assert "hello from 1" in (run_folder / "logs" / "attempt-0001" / "rank-0001.log").read_text()


def test_when_one_rank_dies_the_others_end_within_seconds_and_its_last_lines_are_shown(launch):
    lines = [f"line {n}" for n in range(40)]
    started = time.monotonic()
    exit_code, display, run_folder = launch(
        {"sleep": 60, "on_term": "ignore", "child": True}, {"say": lines, "sleep": 0.3, "exit": 7}
    )
    assert exit_code == 1
    assert time.monotonic() - started < 5
    assert "rank 1 ended with exit code 7" in display.text
    assert "line 39" in display.text
    assert "line 20" not in display.text
    assert str(run_folder / "logs" / "attempt-0001" / "rank-0001.log") in display.text


def test_a_rank_killed_by_the_kernel_is_named_with_a_hint(launch):
    exit_code, display, _ = launch({"signal": 9}, {"sleep": 60})
    assert exit_code == 1
    assert "rank 0 was ended by SIGKILL: out of memory" in display.text


def test_wrong_input_found_by_a_rank_is_exit_code_2(launch):
    exit_code, display, _ = launch({"sleep": 60}, {"say": ["error: no such corpus"], "exit": 2})
    assert exit_code == 2
    assert "error: no such corpus" in display.text


def test_ranks_that_all_end_with_75_can_be_resumed(launch):
    exit_code, display, _ = launch({"exit": 75}, {"exit": 75})
    assert exit_code == 75
    assert "run the same command again to resume" in display.text


def test_a_rank_that_outlives_the_others_too_long_is_killed(launch):
    exit_code, display, _ = launch({"exit": 0}, {"sleep": 60}, save_s=0.3)
    assert exit_code == 1
    assert "killed rank 1: it did not end in time" in display.text


def test_what_a_dead_rank_leaves_running_is_killed(launch):
    exit_code, _, run_folder = launch({"child": True})
    assert exit_code == 0
    assert (run_folder / "child-0").exists()
    assert running_pids(run_folder) == []


def test_only_lines_of_this_attempt_are_shown(launch):
    launch({"say": ["old trouble"], "exit": 1})
    _, display, run_folder = launch({"say": ["new trouble"], "exit": 1})
    assert "new trouble" in display.text
    assert "old trouble" not in display.text
    assert "old trouble" in (run_folder / "logs" / "attempt-0001" / "rank-0000.log").read_text()


# -------------------------------------------------------------------------------------------------- the status


def test_each_event_is_shown_once_and_an_earlier_attempt_is_ignored(launch, tmp_path):
    run_folder = make_config(tmp_path).run_folder
    old = {"state": "done", "step": 99, "heartbeat": time.time() + 50, "attempt": 0, "events": ["ancient"]}
    (run_folder / "status.json").write_text(json.dumps(old))
    _, display, _ = launch(
        {
            "sleep": 0.3,
            "status": [
                {"state": "training", "step": 1, "events": ["resumed from step 0"]},
                {"state": "training", "step": 2, "events": ["resumed from step 0", "checkpoint step-00000002"]},
                {"state": "done", "step": 3, "events": ["resumed from step 0", "checkpoint step-00000002"]},
            ],
        }
    )
    assert display.messages == ["resumed from step 0", "checkpoint step-00000002"]
    assert 99 not in display.steps
    assert display.steps[-1] == 3


def test_a_run_whose_rank_was_killed_does_not_keep_the_state_training(launch):
    _, _, run_folder = launch({"status": [{"state": "training", "step": 4}], "signal": 9})
    status = json.loads((run_folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["step"] == 4
    assert "SIGKILL" in status["message"]


# ------------------------------------------------------------------------------------- signals to the launcher

LAUNCHER = """
import sys
from pathlib import Path
from launch.local import training
from launch.terminal.console import make_console
from launch.local.display import make_display
from pretrain.config.run import RunConfig
folder = Path(sys.argv[1])
config = RunConfig.model_validate({"name": "run", "runs": folder / "my runs", "corpus": {"path": folder / "corpus"}})
training.rank_command = lambda run_folder: [sys.executable, "-c", sys.argv[2], str(run_folder)]
sys.exit(training.launch_local(config, 2, make_display(make_console())))
"""


@pytest.fixture
def launcher(tmp_path: Path):
    """Start a launcher as a process of its own, with two ranks that follow `plans`."""
    run_folder = make_config(tmp_path).run_folder
    started: list[subprocess.Popen[str]] = []

    def start(*plans: dict) -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(tmp_path), RANK],
            env={**os.environ, "PLANS": json.dumps(plans)},
            cwd=Path(training.__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        wait_for(lambda: all((run_folder / f"pid-{rank}").exists() for rank in range(2)))
        wait_for(lambda: len(running_pids(run_folder)) >= 2)
        return process, run_folder

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate()
    for pid in running_pids(run_folder):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_lets_the_ranks_save_and_exits_with_75(launcher, number):
    process, run_folder = launcher(*[{"sleep": 60, "on_term": "save"}] * 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 75
    assert "finishing the step and saving" in output
    assert "run the same command again to resume" in output
    assert "saving" in (run_folder / "logs" / "attempt-0001" / "rank-0001.log").read_text()
    assert running_pids(run_folder) == []


def test_a_second_ctrl_c_ends_ranks_that_do_not_listen(launcher):
    process, run_folder = launcher(*[{"sleep": 60, "on_term": "ignore", "child": True}] * 2)
    process.send_signal(signal.SIGINT)
    time.sleep(PATIENCE.repeat_s + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=5)
    assert process.returncode == 1
    assert "stopping at once" in output
    assert running_pids(run_folder) == []


def test_a_signal_before_the_ranks_can_handle_it_is_still_an_interruption(launcher):
    process, run_folder = launcher({"sleep": 60}, {"sleep": 60})
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 75
    assert running_pids(run_folder) == []


def test_no_rank_survives_a_launcher_that_is_killed(launcher):
    process, run_folder = launcher(*[{"sleep": 60, "on_term": "ignore"}] * 2)
    assert len(running_pids(run_folder)) == 2
    process.kill()
    process.wait()
    wait_for(lambda: running_pids(run_folder) == [], timeout_s=3)
    assert running_pids(run_folder) == []


# ---------------------------------------------------------------------------------------- a rank's surroundings


def test_ranks_get_the_rendezvous_and_share_the_cores(monkeypatch):
    monkeypatch.setattr(ranks, "num_cores", lambda: 8)
    environment = ranks.rank_environment(1, 2, 4321, 0, {"HOME": "/home/me", "RANK": "7"})
    assert environment["RANK"] == environment["LOCAL_RANK"] == "1"
    assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == "2"
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "4321")
    assert environment["OMP_NUM_THREADS"] == "4"
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert environment["HOME"] == "/home/me"
    assert environment["DIPTYCH_LAUNCHER_PID"] == str(os.getpid())


def test_what_the_user_set_is_kept():
    environment = ranks.rank_environment(0, 1, 4321, 1, {"OMP_NUM_THREADS": "3", "GLOO_SOCKET_IFNAME": "eth0"})
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["GLOO_SOCKET_IFNAME"] == "eth0"
    assert "DS_ACCELERATOR" not in environment


def test_the_port_of_a_launch_is_none_that_the_system_gives_to_others_before_rank_0_binds_it():
    lowest_given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {ranks.free_port() for _ in range(50)}
    assert max(ports) < lowest_given
    assert len(ports) > 40
