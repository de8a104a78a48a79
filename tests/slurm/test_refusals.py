"""What a real cluster cannot give is refused before anything is queued."""

import json
import os
import signal
from collections.abc import Iterator

import pytest

from tests.slurm.conftest import Cluster


@pytest.fixture
def limited(slurm: Cluster) -> Iterator[Cluster]:
    """The partition `main` with limits."""
    slurm.ask("scontrol", "update", "PartitionName=main", "MaxNodes=2", "MaxTime=01:00:00")
    yield slurm
    slurm.ask("scontrol", "update", "PartitionName=main", "MaxNodes=UNLIMITED", "MaxTime=UNLIMITED")


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--partition", "gpu"], "no partition 'gpu'; set cluster.partition (--partition) to one of main, preempt"),
        (["--nodes", "4", "--time", "30:00"], "cluster.nodes = 4, but partition main gives a job at most 2 nodes"),
        (["--nodes", "8", "-p", "preempt"], "cluster.nodes = 8, but partition preempt gives a job at most 4 nodes"),
        (["--time", "2:00:00"], "cluster.time = 2:00:00, but partition main gives a job at most 1:00:00"),
        (
            ["--time", "30:00", "cluster.evaluation.time=2:00:00"],
            "cluster.evaluation.time = 02:00:00, but",
        ),
        (["--time", "30:00", "--mem", "900G"], "Slurm refuses the job: "),
        (["--time", "30:00", "--constraint", "h100"], "Slurm refuses the job: "),
        (["--nodes", "3", "-p", "preempt"], "3 ranks cannot share data.streams = 16"),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_with_the_reason(limited: Cluster, options, answer):
    options = [*options, "cluster.evaluation.time=10:00"] if "evaluation" not in str(options) else options
    assert answer in limited.diptych("submit", "tiny.yaml", "name=refused", *options, code=2)
    assert not limited.run("refused").exists()
    assert not limited.ask("squeue", "-h")


def test_a_folder_that_the_nodes_do_not_see_is_an_answer_and_no_hang(slurm: Cluster):
    unseen = slurm.folder / "local" / "runs"
    slurm.diptych("submit", "tiny.yaml", "name=blind", f"runs={unseen}")
    record = json.loads((unseen / "blind" / "submissions" / "001" / "submission.json").read_text())
    slurm.wait(lambda: slurm.state(record["jobs"]["train"]) == "FAILED", "end of the job", 60)
    table = slurm.diptych("runs", "--folder", str(unseen))
    assert f"does not see {unseen}/blind/submissions/001: set runs= to a folder that all nodes share" in table


def test_while_the_controller_is_away_the_list_of_runs_says_so_and_goes_by_heartbeats(slurm: Cluster):
    slurm.diptych("submit", "tiny.yaml", "name=silent", "--no-evaluate", "cluster.sbatch.begin=now+3600")
    processes = json.loads((slurm.folder / "cluster.json").read_text())["processes"]
    os.kill(processes["slurmctld"]["pid"], signal.SIGSTOP)
    try:
        table = slurm.diptych("runs")
        assert "states are those that the runs wrote themselves" in table
        assert "no answer" in table
        assert "not started" in table
        assert "nothing was cancelled, try again when it is back" in slurm.diptych("cancel", "silent", code=2)
    finally:
        os.kill(processes["slurmctld"]["pid"], signal.SIGCONT)
    assert "taken out of the queue" in slurm.diptych("cancel", "silent")
