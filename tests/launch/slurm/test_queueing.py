"""What is sent to Slurm, and what is refused before: all that needs no Slurm. tests/slurm/ has the rest."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from launch.cli import app
from launch.commands.cluster_options import METAVARS
from launch.slurm import queueing, submission
from launch.slurm.scripts import batch_scripts
from launch.slurm.submission import (
    fill_folder,
    make_folder,
    newest_submission,
    node_counts,
    settings,
    submissions_of,
)
from pretrain.config.cluster import ClusterConfig, time_seconds
from pretrain.config.load import load_config, validate
from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.training.monitor.profiled_steps import ProfiledSteps

GOLDEN = Path(__file__).parent / "golden"
EVERYTHING = {
    "nodes": 4,
    "min_nodes": 2,
    "gpus_per_node": 2,
    "cpus_per_task": 8,
    "time": "2-00:00:00",
    "partition": "gpu",
    "account": "physics",
    "qos": "high",
    "mem": "64G",
    "constraint": "h100",
    "exclude": "n[1-2]",
    "dependency": "afterok:12",
    "setup": ["module load cuda", "export NCCL_DEBUG=WARN"],
    "signal_delay_s": 300,
    "sbatch": {"reservation": "mine"},
    "evaluation": {"time": "00:30:00", "cpus": 2, "mem": "8G", "partition": "small"},
}


def config_of(cluster: dict, **values: object) -> RunConfig:
    run = {"name": "first", "runs": "/shared/runs", "corpus": {"path": "/c"}, **values, "cluster": cluster}
    return validate(run, "test")


def run_command(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("name", ["train", "evaluate", "sweep"])
def test_the_script_that_is_sent_is_the_golden_one(name):
    config, folder = config_of(EVERYTHING), Path("/shared/my runs/first/submissions/001")
    made = batch_scripts(config, folder, "0123456789abcdef", name="first", members=6 if name == "sweep" else 0)
    assert made["train" if name == "sweep" else name] == (GOLDEN / f"{name}.sbatch").read_text()


def test_a_dry_run_prints_both_scripts_and_touches_nothing(tmp_path):
    printed = run_command(
        "submit", "quickstart", f"runs={tmp_path}/runs", "--dry-run", "--nodes", "2", "--time", "24:00:00"
    )
    assert printed.count("#!/bin/bash") == 2
    assert "#SBATCH --time=24:00:00" in printed
    assert "#SBATCH --nodes=2" in printed
    assert "--dependency=afterok:JOB --kill-on-invalid-dep=yes" in printed
    assert not (tmp_path / "runs").exists()


def test_every_option_stands_for_a_key_of_the_section_cluster(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("first.yaml").write_text("corpus: {path: /c}\n")
    options, rest = [], []
    for key, value in EVERYTHING.items():
        if key in METAVARS:
            name = {"signal_delay_s": "--signal-delay"}.get(key, f"--{key.replace('_', '-')}")
            options += [word for item in (value if isinstance(value, list) else [value]) for word in (name, str(item))]
        else:
            rest.append(f"cluster.{key}={json.dumps(value)}")
    printed = run_command("submit", "first.yaml", "runs=/shared/my runs", *rest, *options, "--dry-run")
    golden = (GOLDEN / "train.sbatch").read_text()
    assert printed.startswith(
        golden.replace("submissions/001", "submissions/NUMBER").replace("0123456789abcdef", "TOKEN")
    )
    assert METAVARS.keys() - EVERYTHING.keys() == {"array_parallelism", "container"}
    assert METAVARS.keys() <= ClusterConfig.model_fields.keys()


def test_a_dry_run_of_a_sweep_also_prints_its_members_and_no_more_of_them_train_at_once_than_asked(tmp_path):
    command = ["sweep", "quickstart", f"runs={tmp_path}/runs", "name=grid", "--dry-run", "--array-parallelism", "2"]
    printed = run_command(*command, "--partition", "gpu", "--grid", "model.attention=causal,dual_triangle", "seed=1,2")
    assert f"# 4 members in {tmp_path}/runs/grid" in printed
    assert "#     3  dual_triangle-seed2  model.attention=dual_triangle seed=2" in printed
    assert printed.count("#SBATCH --array=0-3%2") == 2
    assert printed.count("#SBATCH --partition=gpu") == 2
    assert "--dependency=aftercorr:JOB" in printed
    here = run_command(*command, "--local", "--grid", "seed=1,2")
    assert "# 2 members" in here
    assert "#SBATCH" not in here
    assert not (tmp_path / "runs").exists()


def test_without_sbatch_nothing_is_submitted_and_the_answer_says_where_to_go(make_config, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    config = make_config()
    with pytest.raises(UserError, match="no sbatch on this machine: submit from a login node"):
        queueing.queue_run(config, Console(), evaluate=True)
    assert not config.run_folder.exists()


def test_ranks_that_do_not_divide_the_streams_are_refused_before_anything_else(make_config):
    config = make_config(cluster={"nodes": 3})
    with pytest.raises(UserError, match=r"3 ranks cannot share data.streams = 16"):
        queueing.queue_run(config, Console(), evaluate=True)
    with pytest.raises(UserError, match="3 ranks cannot share"):
        queueing.queue_run(config, Console(), evaluate=True, queue=False)


def test_a_missing_corpus_is_refused_before_a_node_waits_for_it(make_config, tmp_path):
    config = make_config(corpus={"path": str(tmp_path / "none"), "sources": []})
    with pytest.raises(UserError, match="build it first, with `diptych data build"):
        queueing.queue_run(config, Console(), evaluate=True, queue=False)


def test_a_finished_run_is_not_submitted_again(make_config):
    config = make_config()
    (config.run_folder / "checkpoints" / "step-00000009").mkdir(parents=True)
    status = {"state": "done", "tokens": 12_000, "checkpoint": "step-00000009", "heartbeat": 1}
    (config.run_folder / "status.json").write_text(json.dumps(status))
    with pytest.raises(UserError, match="is trained to its 12,000 tokens already"):
        queueing.queue_run(config, Console(), evaluate=True, queue=False)


def test_the_evaluation_waits_for_the_training_and_goes_with_it(make_config, fake_slurm):
    config = make_config()
    folder = queueing.queue_run(config, Console(), evaluate=True)
    *tests, train, evaluate = fake_slurm.calls("sbatch")
    assert [call.split()[1] for call in tests] == ["--test-only", "--test-only"]
    assert train == "sbatch --parsable"
    assert evaluate == "sbatch --parsable --dependency=afterok:101 --kill-on-invalid-dep=yes"
    assert json.loads((folder / "submission.json").read_text())["jobs"] == {"train": "101", "evaluate": "102"}


def test_where_the_evaluation_is_refused_its_training_does_not_stay_queued(make_config, fake_slurm):
    fake_slurm.refuse(102)
    with pytest.raises(UserError, match="Slurm refuses the job: .*Invalid account"):
        queueing.queue_run(make_config(), Console(), evaluate=True)
    assert fake_slurm.calls("scancel") == ["scancel 101"]


def test_where_the_training_is_refused_nothing_is_cancelled(make_config, fake_slurm):
    fake_slurm.refuse(101)
    with pytest.raises(UserError, match="Slurm refuses the job"):
        queueing.queue_run(make_config(), Console(), evaluate=True)
    assert fake_slurm.calls("scancel") == []


@pytest.mark.parametrize(("state", "doing"), [("PENDING", "queued"), ("RUNNING", "running"), ("COMPLETED", "")])
def test_a_run_that_is_queued_is_not_queued_again(make_config, fake_slurm, state, doing):
    queueing.queue_run(make_config(), Console(), evaluate=False)
    fake_slurm.queue(job_101=state)
    if doing:
        with pytest.raises(UserError, match=f"run is {doing} already, as job 101"):
            queueing.queue_run(make_config(), Console(), evaluate=False)
    else:
        queueing.queue_run(make_config(), Console(), evaluate=False)
    assert len(fake_slurm.calls("sbatch")) == (2 if doing else 4)


def test_a_submission_holds_code_and_config_that_later_changes_do_not_reach(make_config):
    config = make_config()
    folder = queueing.queue_run(config, Console(), evaluate=True, queue=False)
    assert folder == config.run_folder / "submissions" / "001"
    assert not list(folder.rglob("__pycache__"))
    ran = subprocess.run(
        [sys.executable, "-P", "-c", "import launch.cli, pretrain; print(launch.__file__, pretrain.__file__)"],
        env={"PYTHONPATH": str(folder / "code"), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.split() == [f"{folder}/code/launch/__init__.py", f"{folder}/code/pretrain/__init__.py"]
    assert (folder / "code" / "configs" / "quickstart.yaml").is_file()
    assert load_config(str(config.run_folder / "config.yaml")) == config
    assert (folder.stat().st_mode & 0o777) == 0o700
    record = newest_submission(RunFolder(config.run_folder))
    assert record is not None
    assert record.jobs == {}
    assert (folder / f"token-{record.token}").exists()
    assert record.token in (folder / "train.sbatch").read_text()


def test_the_ranks_of_a_job_are_told_which_steps_to_profile_and_impossible_ones_are_refused(make_config):
    config = make_config()
    with pytest.raises(UserError, match="--profile 90000:90001: 12,000 tokens take fewer than"):
        queueing.queue_run(config, Console(), evaluate=True, queue=False, profile=ProfiledSteps(90_000, 90_001))
    folder = queueing.queue_run(config, Console(), evaluate=True, queue=False, profile=ProfiledSteps(2, 3))
    shown = subprocess.run(
        ["bash", "-c", f". {folder}/settings.sh; printenv DIPTYCH_PROFILE"], capture_output=True, text=True, check=True
    )
    assert shown.stdout == "2:3\n"


def test_where_there_is_no_room_for_the_code_that_is_the_answer_and_nothing_is_left(make_config, monkeypatch):
    config = make_config()

    def full(source: Path, target: Path, **_: object) -> None:
        target.mkdir(parents=True)
        raise shutil.Error([(str(source / "a.py"), str(target / "a.py"), "[Errno 28] No space left on device")])

    monkeypatch.setattr(submission.shutil, "copytree", full)
    with pytest.raises(
        UserError, match=r"cannot write .*/submissions/001 \(\[Errno 28\] No space left on device\); make"
    ):
        queueing.queue_run(config, Console(), evaluate=True, queue=False)
    assert not list((config.run_folder / "submissions").iterdir())


def test_the_commit_and_the_difference_from_it_are_kept(tmp_path, monkeypatch):
    home = tmp_path / "checkout"
    for package in ("pretrain", "launch", "configs"):
        (home / package).mkdir(parents=True)
        (home / package / "a.py").write_text("one\n")
    git = ["git", "-C", str(home), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(submission, "HOME", home)
    commit = submission.copy_code(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit or "")
    (home / "launch" / "a.py").write_text("two\n")
    assert submission.copy_code(make_folder(RunFolder(tmp_path).submissions)) == f"{commit}+"
    difference = (tmp_path / "submissions" / "001" / "code.diff").read_text()
    assert "-one\n+two\n" in difference


def test_every_submission_has_a_folder_of_its_own(tmp_path):
    config = config_of({}, runs=str(tmp_path))
    run = RunFolder(tmp_path / "run")
    first, second = make_folder(run.submissions), make_folder(run.submissions)
    fill_folder(first, config)
    assert newest_submission(run) is not None
    latest = fill_folder(second, config)
    assert [folder for folder, _ in submissions_of(run)] == [second, first]
    assert newest_submission(run) == latest


def test_only_numbers_of_nodes_that_divide_the_streams_are_used():
    assert node_counts(config_of({"nodes": 8, "min_nodes": 1})) == [8, 4, 2, 1]
    assert node_counts(config_of({"nodes": 4, "min_nodes": 3})) == [4]
    assert node_counts(config_of({"nodes": 4, "min_nodes": 2, "gpus_per_node": 8})) == [4, 2]


def shell_values(text: str, *names: str) -> list[list[str]]:
    """What bash makes of variables of settings.sh, as arrays."""
    asked = "".join(f'printf "%s\\n" "${{{name}[@]}}"; echo ---; ' for name in names)
    done = subprocess.run(["bash", "-c", f"{text}\n{asked}"], capture_output=True, text=True, check=True)
    return [part.splitlines() for part in done.stdout.split("---\n")[:-1]]


def test_settings_survive_the_shell_with_spaces_in_names(tmp_path):
    config = config_of({"nodes": 4, "min_nodes": 2, "max_requeues": 3}, runs="/shared/my runs")
    text = settings(config, "ab12")
    assert shell_values(text, "run", "node_counts", "max_requeues", "python", "srun_arguments") == [
        ["/shared/my runs/first"],
        ["4 2"],
        ["3"],
        [sys.executable],
        [""],
    ]


@pytest.mark.parametrize(
    ("cluster", "srun", "python"),
    [
        (
            {"container": "nvcr.io#nvidia/pytorch:25.01"},
            ["--container-image=nvcr.io#nvidia/pytorch:25.01", "--container-mounts=/r:/r,/c:/c"],
            ["python3"],
        ),
        (
            {"container": "/images/x.sif", "gpus_per_node": 1, "python": "/opt/python"},
            [""],
            ["apptainer", "exec", "--nv", "--bind", "/r", "--bind", "/c", "/images/x.sif", "/opt/python"],
        ),
    ],
)
def test_in_a_container_the_ranks_see_the_run_and_the_corpus(cluster, srun, python):
    assert shell_values(settings(config_of(cluster, runs="/r"), "t"), "srun_arguments", "python") == [srun, python]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86_400), ("1-2", 93_600), ("2-00:30", 174_600), ("1-00:00:01", 86_401)],
)
def test_times_are_read_as_slurm_reads_them(time, seconds):
    assert time_seconds(time) == seconds


@pytest.mark.parametrize(
    ("cluster", "answer"),
    [
        ({"time": "soon"}, "expected HOURS:MINUTES:SECONDS"),
        ({"nodes": 2, "min_nodes": 3}, "min_nodes = 3 is more than nodes = 2"),
        ({"gpus_per_node": 2, "tasks_per_node": 4}, "a rank needs one of the GPUs"),
        ({"node": 2}, r"did you mean cluster.nodes\?"),
    ],
)
def test_a_mistake_in_the_cluster_section_is_answered(cluster, answer):
    with pytest.raises(UserError, match=answer):
        config_of(cluster)
