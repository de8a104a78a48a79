"""Nodes and ranks that are lost, stuck or cut off."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.verify import verify_checkpoint
from tests.slurm.conftest import Cluster, kill, losses


def test_after_the_loss_of_a_node_the_run_goes_on_with_fewer(slurm: Cluster, whole: Path):
    slurm.diptych("submit", "tiny.yaml", "name=node", "--nodes", "4", "--min-nodes", "2", "--no-evaluate")
    slurm.wait_for_step("node", 30)
    slurm.tool("fail", "n4", "--how", "power")
    lost_at = slurm.steps("node")[-1]
    slurm.wait(lambda: len(slurm.starts("node")) == 2, "second start")
    slurm.wait_for_state(slurm.job("node"), "COMPLETED", "RUNNING", "COMPLETING")
    slurm.wait(lambda: slurm.state(slurm.job("node")) == "COMPLETED", "end of the run")
    first, second = slurm.starts("node")
    assert (first.ranks, second.ranks, second.exit_code) == (4, 2, 0)
    log = (slurm.run("node") / "logs" / "attempt-0002" / "rank-0000.log").read_text()
    resumed_at = int(log.partition("resumed from step-")[2][:8])
    assert resumed_at >= lost_at - lost_at % 10 - 10
    # The same rows and the same global batch on two ranks: sums in another order are all that differs.
    ours, theirs = losses(slurm.run("node")), losses(whole)
    assert [(step, rows) for step, _, rows in ours] == [(step, rows) for step, _, rows in theirs]
    assert [loss for _, loss, _ in ours] == pytest.approx([loss for _, loss, _ in theirs], rel=0.01)
    assert "--nodes=2-4" in next(slurm.run("node").glob("submissions/001/train.sbatch")).read_text()


def test_ranks_that_linger_after_a_failure_end_within_seconds_and_the_run_can_be_cancelled_and_resumed(slurm: Cluster):
    slurm.diptych("submit", "tiny.yaml", "name=stuck", "--nodes", "2")
    slurm.wait_for_step("stuck", 20)
    ranks = slurm.rank_processes("stuck")
    assert len(ranks) == 2
    stopped, killed = ranks.values()
    # Slurm wakes what is stopped before it ends it; a rank that hangs in a collective hears nothing even then.
    hang = subprocess.Popen(["bash", "-c", f"while kill -STOP {stopped}; do sleep 0.002; done 2>/dev/null"])
    kill(killed, signal.SIGKILL)
    began = time.monotonic()
    slurm.wait(lambda: slurm.starts("stuck")[0].exit_code is not None, "end of the job")
    assert time.monotonic() - began < 20, "KillWait is 30 s"
    hang.wait(timeout=10)
    assert not slurm.rank_processes("stuck")
    assert "exit code 137; back into the queue" in str(slurm.starts("stuck")[0].why)

    train, evaluate = slurm.job("stuck"), slurm.job("stuck", "evaluate")
    slurm.wait(lambda: slurm.state(train) == "PENDING", "requeued job")
    table = slurm.diptych("runs")
    assert f"{train} pending" in table
    assert "exit code 137; back into the queue" in table
    assert f"job {train} (train) is taken out of the queue" in slurm.diptych("cancel", "stuck")
    slurm.wait(lambda: (slurm.state(train), slurm.state(evaluate)) == ("CANCELLED", "CANCELLED"), "empty queue")
    assert "neither queued nor running" in slurm.diptych("cancel", "stuck", code=2)
    assert "drain" not in slurm.ask("sinfo", "-h", "-o", "%T")

    before = slurm.steps("stuck")[-1]
    assert "resuming" in slurm.diptych("resume", "stuck")
    again = slurm.job("stuck")
    assert again != train
    slurm.wait(lambda: len(slurm.starts("stuck")) == 2, "second start")
    slurm.wait_for_step("stuck", before + 5)
    assert "resumed from step-" in slurm.diptych("logs", "stuck", "--rank", "1")
    assert f"job {again} saves and ends" in slurm.diptych("cancel", "stuck")
    slurm.wait(lambda: slurm.starts("stuck")[1].exit_code == 75, "end of the cancelled run")
    assert slurm.starts("stuck")[1].why == "cancelled"
    newest = list_checkpoints(slurm.run("stuck") / "checkpoints")[-1]
    assert int(newest.name.removeprefix("step-")) == slurm.steps("stuck")[-1]
    slurm.wait(lambda: not slurm.ask("squeue", "-h"), "empty queue")


def test_after_a_cut_cable_the_old_ranks_write_nothing_once_the_job_has_started_elsewhere(slurm: Cluster):
    slurm.diptych(
        "submit", "tiny.yaml", "name=cut", "--no-evaluate", "training.tokens=4_000_000", "checkpoint.every=50"
    )
    slurm.wait_for_step("cut", 60)
    (node,) = slurm.rank_processes("cut")
    slurm.tool("fail", node, "--how", "net")
    cut_at = slurm.steps("cut")[-1]
    slurm.wait(lambda: len(slurm.starts("cut")) == 2, "start elsewhere")
    logs = slurm.run("cut") / "logs"
    slurm.wait(lambda: (logs / "attempt-0002" / "rank-0000.log").exists(), "second attempt")
    old_log = logs / "attempt-0001" / "rank-0000.log"
    slurm.wait(lambda: "attempt 2 has taken over" in old_log.read_text(), "end of the old rank")
    slurm.wait(lambda: slurm.starts("cut")[0].exit_code is not None, "end of the old job")
    old, new = slurm.starts("cut")
    assert (old.exit_code, old.why) == (1, "a newer start has taken the run over")
    assert old.nodes != new.nodes
    # It went on beside the cut, and came to its end by itself: nobody could have told it.
    resumed_at = int((logs / "attempt-0002" / "rank-0000.log").read_text().partition("resumed from step-")[2][:8])
    assert resumed_at > cut_at
    slurm.wait_for_step("cut", resumed_at + 120)
    slurm.diptych("cancel", "cut")
    slurm.wait(lambda: slurm.starts("cut")[1].exit_code == 75, "end of the cancelled run")
    assert slurm.steps("cut") == list(range(1, slurm.steps("cut")[-1] + 1))
    for checkpoint in list_checkpoints(slurm.run("cut") / "checkpoints"):
        assert verify_checkpoint(checkpoint) == []
