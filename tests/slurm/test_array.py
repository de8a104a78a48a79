"""A sweep as a job array on a real cluster."""

from tests.slurm.conftest import Cluster


def test_an_array_of_four_goes_on_past_a_member_that_fails_and_evaluates_the_others(slurm: Cluster):
    weights = "data.source_weights={},{nowhere: 1}"
    command = ["sweep", "tiny.yaml", "name=grid", "training.tokens=20_000", "cluster.array_parallelism=2", "--grid"]
    printed = slurm.diptych(*command, weights, "seed=1,2")
    assert "queued 4 of 4 members of grid" in printed
    assert "nothing to do" in slurm.diptych(*command, weights, "seed=1,2")
    slurm.wait(lambda: not slurm.ask("squeue", "-h"), "end of the sweep")
    table = slurm.diptych("sweep", "show", "grid")
    assert table.count("2 of 2") == 1
    assert table.count("0 of 2") == 1
    assert (slurm.run("grid") / "curves.png").exists()
    assert len(list(slurm.run("grid").glob("*/evaluation/context/report.json"))) == 2
    assert "source_weights names nowhere" in slurm.diptych("runs")
    assert "queued 2 of 4 members" in slurm.diptych(*command, weights, "seed=1,2")
