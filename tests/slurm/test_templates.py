"""slurm/*.sbatch on a real cluster: what sites without submitit use."""

import re
from pathlib import Path

from pretrain.data.manifest import load_manifest
from tests.slurm.conftest import ROOT, Cluster, losses

SMALL = ("--parsable", "--cpus-per-task=1", "--mem=500M")
APPTAINER = """#!/bin/bash
# What apptainer does, without a container: its options, an image, a command.
shift
while [[ $1 == --* ]]; do
    [[ $1 == --bind ]] && shift
    shift
done
echo "$1" >>images-used
shift
exec "$@"
"""


def queue(cluster: Cluster, script: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
    """Submit one of the scripts; returns the job's id."""
    path = script if script.startswith("/") else str(ROOT / "slurm" / f"{script}.sbatch")
    return cluster.ask("sbatch", *SMALL, *options, path, *arguments)


def output(cluster: Cluster, pattern: str) -> str:
    """What a job has printed where it was submitted."""
    return "".join(path.read_text() for path in sorted(cluster.project.glob(pattern)))


def test_a_run_of_the_train_script_in_a_container_goes_on_after_a_signal_and_a_requeue_and_is_evaluated(
    slurm: Cluster, whole: Path
):
    slurm.tools.mkdir(exist_ok=True)
    (slurm.tools / "apptainer").write_text(APPTAINER)
    (slurm.tools / "apptainer").chmod(0o755)
    script = (ROOT / "slurm" / "train.sbatch").read_text()
    (slurm.project / "train.sbatch").write_text(re.sub(r"(?m)^# (image=.*sif|diptych=.apptainer.*)$", r"\1", script))

    train = queue(slurm, f"{slurm.project}/train.sbatch", "tiny.yaml", "name=by-hand", options=("--nodes=4",))
    after = (f"--dependency=afterok:{train}", "--kill-on-invalid-dep=yes")
    evaluate = queue(slurm, "evaluate", "by-hand", options=after)
    slurm.wait_for_step("by-hand", 20)
    assert f"{train} running" in slurm.diptych("runs")
    assert "by-hand is running already" in slurm.diptych("submit", "tiny.yaml", "name=by-hand", code=2)
    slurm.ask("scancel", "--signal=USR2", train)
    slurm.wait(lambda: len(slurm.starts("by-hand")) == 2, "second start")
    slurm.wait_for_step("by-hand", slurm.steps("by-hand")[-1] + 10)
    slurm.ask("scontrol", "requeue", train)
    slurm.wait(lambda: len(slurm.starts("by-hand")) == 3, "third start")
    slurm.wait_for_state(evaluate, "COMPLETED")
    assert [(start.exit_code, start.ranks) for start in slurm.starts("by-hand")] == [(75, 4), (75, 4), (0, 4)]
    assert losses(slurm.run("by-hand")) == losses(whole)
    assert (slurm.run("by-hand") / "evaluation" / "context" / "report.json").exists()
    assert len(list(slurm.run("by-hand").glob("submissions/*"))) == 1
    # The command that prepares it, at each start, and four ranks at each start.
    assert (slurm.project / "images-used").read_text().splitlines() == ["/images/diptych.sif"] * 15

    again = queue(slurm, "train", "tiny.yaml", "name=by-hand")
    slurm.wait_for_state(again, "COMPLETED")
    assert "is trained to its 100,000 tokens already" in output(slurm, f"diptych-{again}.out")
    wrong = queue(slurm, "train", "tiny.yaml", "name=three", options=("--nodes=3",))
    slurm.wait_for_state(wrong, "FAILED")
    assert "3 ranks cannot share data.streams = 16" in output(slurm, f"diptych-{wrong}.out")


def test_the_sweep_script_trains_a_member_in_each_job_of_an_array_and_they_are_evaluated(slurm: Cluster):
    command = ("tiny.yaml", "name=hands", "training.tokens=10_000", "seed=1,2")
    train = queue(slurm, "sweep", *command, options=("--array=0-2%2",))
    evaluate = queue(slurm, "evaluate", "runs/hands", options=(f"--dependency=afterany:{train}", "--array=0-1"))
    slurm.wait(lambda: not slurm.ask("squeue", "-h"), "end of the sweep")
    assert "2 of 2" in slurm.diptych("sweep", "show", "hands")
    assert len(list(slurm.run("hands").glob("*/evaluation/context/report.json"))) == 2
    assert "there is no member 2; the members of hands are 0 to 1" in output(slurm, f"diptych-{train}_2.out")
    assert slurm.state(f"{evaluate}_1") == "COMPLETED"
    again = queue(slurm, "sweep", *command, options=("--array=0-1",))
    slurm.wait(lambda: not slurm.ask("squeue", "-h"), "end of the array")
    assert output(slurm, f"diptych-{again}_*.out").count("is trained and evaluated already") == 2


def test_a_corpus_is_built_as_an_array_whose_parts_a_last_job_joins(slurm: Cluster):
    whole = load_manifest(slurm.project / "corpus")
    build = ("tiny.yaml", "corpus.path=in-parts", "corpus.tokenizer.model=corpus/tokenizer.model", "--parts", "3")
    too_early = queue(slurm, "prepare", *build)
    slurm.wait_for_state(too_early, "FAILED")  # or it would see parts of the array
    parts = queue(slurm, "prepare", *build, options=("--array=0-2",))
    join = queue(slurm, "prepare", *build, options=(f"--dependency=afterok:{parts}", "--kill-on-invalid-dep=yes"))
    slurm.wait_for_state(join, "COMPLETED")
    assert "3 of 3 parts of" in output(slurm, f"diptych-prepare-{too_early}.out")
    joined = load_manifest(slurm.project / "in-parts")
    assert {name: split.documents for name, split in joined.splits.items()} == {
        name: split.documents for name, split in whole.splits.items()
    }
    slurm.diptych(
        "train", "tiny.yaml", "corpus.path=in-parts", "name=of-parts", "training.tokens=5_000", "--no-evaluate"
    )


def test_an_evaluation_that_is_interrupted_goes_on_and_one_that_is_cancelled_stays_so(slurm: Cluster, whole: Path):
    evaluate = queue(slurm, "evaluate", "whole", "windows=400", "task_samples=100")
    log = f"diptych-evaluate-{evaluate}.out"
    slurm.wait(lambda: "losses" in output(slurm, log), "first result")
    slurm.ask("scancel", "--signal=USR2", evaluate)
    slurm.wait(lambda: slurm.state(evaluate) == "PENDING", "requeued job")
    assert "run the same command again to continue" in output(slurm, log)
    slurm.wait(lambda: slurm.state(evaluate) == "RUNNING", "second start")
    slurm.ask("scancel", evaluate)
    slurm.wait(lambda: slurm.state(evaluate) == "CANCELLED", "end of the job")
