"""A run's life on a real cluster: queued, preempted, requeued, finished, evaluated."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from pretrain.run.folder import RunFolder
from pretrain.training.monitor.profiled_steps import traces
from tests.slurm.conftest import ROOT, Cluster, losses


def test_a_run_that_is_signalled_early_then_preempted_ends_like_an_unbroken_one_and_is_evaluated(
    slurm: Cluster, whole: Path
):
    checkout = slurm.project / "a checkout"
    for part in ("pretrain", "launch", "configs"):
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["submit", "tiny.yaml", "name=life", "--nodes", "4", "--partition", "preempt", "--profile", "2:3"]
    assert "evaluation follows as job" in slurm.diptych(*command, "cluster.sbatch.begin=now+10", home=checkout)
    # The job waits; what happens to the checkout must not matter to it.
    for entry in ("pretrain/training/__main__.py", "launch/cli.py"):
        (checkout / entry).write_text("raise SystemExit(9)\n")
    train, evaluate = slurm.job("life"), slurm.job("life", "evaluate")
    refused = slurm.diptych("submit", "tiny.yaml", "name=life", "--nodes", "4", code=2)
    assert f"life is queued already, as job {train}" in refused
    assert f"life is queued already, as job {train}" in slurm.diptych("train", "tiny.yaml", "name=life", code=2)

    # A signal before Python has installed its handlers.
    early = "submissions/001/job-*-start-0/rank-*.log"
    slurm.wait(lambda: len(list(slurm.run("life").glob(early))) == 4, "start of the ranks")
    slurm.ask("scancel", "--signal=USR2", train)
    slurm.wait(lambda: len(slurm.starts("life")) == 2, "second start")
    assert slurm.starts("life")[0].exit_code == 75
    slurm.wait_for_step("life", 20)
    assert "life is running already" in slurm.diptych("submit", "tiny.yaml", "name=life", "--nodes", "4", code=2)

    # A job of a better partition takes the nodes.
    slurm.ask("sbatch", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    slurm.wait(lambda: len(slurm.starts("life")) == 3, "third start")
    assert slurm.starts("life")[1].exit_code == 75
    table = slurm.diptych("runs")
    assert f"{train} running" in table
    assert "saved on request; back into the queue" in table

    slurm.wait_for_state(evaluate, "COMPLETED")
    assert slurm.state(train) == "COMPLETED"
    assert [start.exit_code for start in slurm.starts("life")] == [75, 75, 0]
    assert {start.ranks for start in slurm.starts("life")} == {4}
    # At its second start: the first one takes no step. Later ones are past these steps and say nothing of them.
    assert [path.name[5:9] for path in traces(RunFolder(slurm.run("life")), 2)] == ["0000", "0001", "0002", "0003"]
    report = json.loads((slurm.run("life") / "evaluation" / "context" / "report.json").read_text())

    assert losses(slurm.run("life")) == losses(whole)
    whole_report = json.loads((whole / "evaluation" / "context" / "report.json").read_text())
    assert report["results"] == whole_report["results"]
    assert "is trained to its 100,000 tokens already" in slurm.diptych("submit", "tiny.yaml", "name=life", code=2)


def test_before_its_time_limit_a_run_saves_and_the_number_of_its_restarts_is_bounded(slurm: Cluster):
    limit = ["--time", "00:01:00", "--signal-delay", "15", "cluster.max_requeues=1", "training.tokens=10_000_000"]
    slurm.diptych("submit", "tiny.yaml", "name=limit", *limit)
    train, evaluate = slurm.job("limit"), slurm.job("limit", "evaluate")
    slurm.wait(lambda: len(slurm.starts("limit")) == 2, "second start")
    assert slurm.starts("limit")[0].why == "saved on request; back into the queue"
    slurm.wait_for_step("limit", slurm.steps("limit")[-1] + 5)
    following = subprocess.Popen(
        [sys.executable, "-P", "-m", "launch.cli", "logs", "limit", "-f"],
        cwd=slurm.project,
        env=slurm.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    slurm.ask("scancel", "--signal=USR2", train)
    slurm.wait_for_state(train, "FAILED")
    assert slurm.starts("limit")[1].exit_code == 75
    assert "started again 1 times already (cluster.max_requeues)" in slurm.diptych("runs")
    slurm.wait(lambda: slurm.state(evaluate) == "CANCELLED", "end of the evaluation's waiting")
    assert "saved step-" in following.communicate(timeout=30)[0]
