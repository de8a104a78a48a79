"""A cluster that keeps accounts: what its controller has forgotten is known all the same."""

import json
import os
import shutil
import signal
from collections.abc import Iterator

import pytest

from tests.slurm.conftest import Cluster, need, started


@pytest.fixture
def accounting(slurm: Cluster) -> Iterator[Cluster]:
    """A cluster of one node that forgets jobs after two seconds, with an accounting database."""
    need("slurmdbd", "mariadbd", install="slurmdbd mariadb-server")
    with started("--nodes", "1", "--accounting") as cluster:
        for part in ("corpus", "raw"):
            shutil.copytree(slurm.project / part, cluster.project / part)
        with (cluster.folder / "etc" / "slurm.conf").open("a") as conf:
            conf.write("MinJobAge=2\n")
        cluster.ask("scontrol", "reconfigure")
        yield cluster


def test_jobs_that_the_controller_has_forgotten_are_known_from_the_accounts(accounting: Cluster):
    submit = ["submit", "tiny.yaml", "--no-evaluate"]
    accounting.diptych(*submit, "name=ended", "training.tokens=5_000")
    accounting.diptych(*submit, "name=broken", "data.source_weights={nowhere: 1}")
    accounting.diptych(*submit, "name=killed", "training.tokens=10_000_000")
    jobs = {name: accounting.job(name) for name in ("ended", "broken", "killed")}
    accounting.wait_for_step("killed", 10)
    accounting.ask("scancel", "--full", jobs["killed"])
    accounting.wait(lambda: not accounting.ask("squeue", "-h", "--states=all"), "controller that has forgotten all")
    table = accounting.diptych("runs")
    assert f"{jobs['ended']} completed" in table
    assert f"{jobs['broken']} failed" in table
    assert f"{jobs['killed']} cancelled" in table
    assert "broken ended the last time: source_weights names nowhere" in table
    assert "killed ended the last time: Slurm: cancelled" in table
    assert "neither queued nor running" in accounting.diptych("cancel", "killed", code=2)

    processes = json.loads((accounting.folder / "cluster.json").read_text())["processes"]
    os.kill(processes["slurmctld"]["pid"], signal.SIGKILL)
    table = accounting.diptych("runs")
    assert "Slurm's controller does not answer" in table
    assert table.count("no answer") == 3
    assert "source_weights names nowhere" in table
    assert "attention kernel" in accounting.diptych("logs", "killed")
    answer = "nothing was submitted, try again when it is back"
    assert answer in accounting.diptych("submit", "tiny.yaml", "name=later", code=2)
    assert answer in accounting.diptych("sweep", "tiny.yaml", "name=grid", "seed=1,2", code=2)
