"""The command line, run as a user runs it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import launch
from launch.cli import app, main
from launch.commands.arguments import resumable
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder
from pretrain.run.lock import run_lock

CHECKOUT = Path(launch.__file__).parent.parent


def diptych(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT), "NO_COLOR": "1", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def imported_by(*arguments: str, cwd: Path) -> set[str]:
    """The modules that a command imports."""
    profile = diptych(*arguments, cwd=cwd, PYTHONPROFILEIMPORTTIME="1").stderr
    return {line.rpartition("|")[2].strip() for line in profile.splitlines()}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working directory with a space in its name and one config."""
    folder = tmp_path / "my work"
    folder.mkdir()
    (folder / "mine.yaml").write_text("corpus:\n  path: corpora/mine\ntraining:\n  tokens: 1000\n")
    return folder


@pytest.fixture
def in_process(here, monkeypatch, capsys):
    """Run a command in this process, which has imported the heavy libraries already."""
    monkeypatch.chdir(here)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["diptych", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        code = ended.value.code or 0
        return subprocess.CompletedProcess(arguments, int(code), captured.out, captured.err)

    return run


# ---------------------------------------------------------------------------------------------------- the help


def test_help_lists_every_command_and_does_not_wait_for_torch(here):
    diptych("--help", cwd=here)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = diptych("--help", cwd=here)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    names = ("quickstart", "train", "submit", "sweep", "runs", "data", "evaluate", "model", "plan", "config")
    assert all(f" {name} " in result.stdout for name in names)
    imported = imported_by("--help", cwd=here)
    assert "typer" in imported
    assert imported.isdisjoint({"torch", "deepspeed", "matplotlib", "pydantic"})
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.5


def test_the_list_of_runs_does_not_wait_for_torch(here):
    (here / "runs" / "first").mkdir(parents=True)
    (here / "runs" / "first" / "config.yaml").write_text("")
    imported = imported_by("runs", cwd=here)
    assert "rich.table" in imported
    assert imported.isdisjoint({"torch", "deepspeed", "matplotlib"})


@pytest.mark.parametrize(
    "command",
    [
        "quickstart",
        "train",
        "data build",
        "data verify",
        "data show",
        "evaluate context",
        "runs",
        "submit",
        "logs",
        "cancel",
        "resume",
        "sweep run",
        "sweep show",
        "evaluate probe argmax",
        "evaluate probe passkey",
        "model show",
        "checkpoint list",
        "checkpoint show",
        "checkpoint verify",
        "checkpoint prune",
        "export-weights",
        "plan",
        "config show",
        "config schema",
    ],
)
def test_every_command_explains_itself_with_an_example(command):
    result = CliRunner(env={"NO_COLOR": "1", "COLUMNS": "120"}).invoke(app, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"Example: diptych {command}" in result.output


def test_version(here):
    assert diptych("--version", cwd=here).stdout.startswith("diptych 0.")


# ------------------------------------------------------------------------------------------------- wrong input


def answer(result: subprocess.CompletedProcess[str]) -> str:
    """The error message of a command that found the user's input wrong."""
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


def test_an_unknown_config_is_answered_with_those_there_are(here):
    assert "did you mean quickstart?" in answer(diptych("train", "quikstart", cwd=here))


def test_a_misspelt_key_is_answered_with_the_nearest(in_process):
    message = answer(in_process("config", "show", "mine.yaml", "training.tokns=5"))
    assert "training.tokns" in message
    assert "did you mean training.tokens?" in message


def test_an_override_without_a_value_is_explained(in_process):
    assert "is not KEY=VALUE" in answer(in_process("config", "show", "mine.yaml", "training.tokens"))


def test_a_missing_corpus_is_answered_with_how_to_build_it(here, in_process):
    message = answer(in_process("train", "mine.yaml"))
    assert "no corpus at" in message
    assert "diptych data build" in message
    assert not (here / "runs" / "mine").exists()


def test_nothing_to_build_from_is_said(in_process):
    assert "no corpus.sources" in answer(in_process("data", "build", "mine.yaml"))


def test_a_number_of_processes_that_cannot_share_the_batch_is_refused(in_process, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    message = answer(in_process("train", "mine.yaml", "--nproc", "3"))
    assert "use one of 1, 2, 4, 8" in message


def test_an_unknown_run_to_evaluate_is_answered(in_process):
    assert "no run 'x'" in answer(in_process("evaluate", "context", "x"))


@pytest.mark.parametrize("arguments", [["train"], ["train", "mine.yaml", "--nproc", "0"], ["evaluate", "nothing"]])
def test_wrong_usage_is_exit_code_2(arguments, in_process):
    assert in_process(*arguments).returncode == 2


# ----------------------------------------------------------------------------------------- configs, schema, runs


def test_a_shown_config_is_read_back_to_the_same(here, in_process):
    shown = in_process("config", "show", "mine.yaml", "model.num_layers=6")
    assert shown.returncode == 0
    (here / "again.yaml").write_text(shown.stdout)
    again = in_process("config", "show", "again.yaml")
    assert again.stdout == shown.stdout
    assert "num_layers: 6" in shown.stdout
    assert "tokens: 1000" in shown.stdout
    assert "name: mine" in shown.stdout


def test_the_quickstart_config_is_found_from_anywhere(here, in_process):
    shown = in_process("config", "show", "quickstart")
    assert "name: quickstart" in shown.stdout
    assert str(here / "corpora" / "quickstart") in " ".join(shown.stdout.split())  # a long path is folded


def test_the_schema_describes_every_field_and_forbids_others(in_process):
    schema = json.loads(in_process("config", "schema").stdout)
    assert schema["additionalProperties"] is False
    assert {"corpus", "model", "training", "include"} <= schema["properties"].keys()
    assert all(section["additionalProperties"] is False for section in schema["$defs"].values())
    tokens = schema["$defs"]["TrainingConfig"]["properties"]["tokens"]
    assert tokens["description"].startswith("Stop after this many tokens")
    assert "required" not in schema


def test_runs_are_listed(here, in_process):
    assert "no runs in" in in_process("runs").stdout
    run = here / "runs" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    status = {"state": "done", "step": 431, "tokens": 3_500_000, "total_tokens": 3_500_000, "loss": 3.125}
    (run / "status.json").write_text(json.dumps({**status, "heartbeat": time.time()}))
    listed = in_process("runs").stdout
    assert all(text in listed for text in ("first", "done", "431", "3.50M of 3.50M", "3.125"))


# ------------------------------------------------------------------------------------------------------- corpora


def test_a_corpus_is_shown_by_its_folder_or_its_config(here, corpus_values, in_process):
    (here / "built.yaml").write_text(json.dumps({"corpus": corpus_values, "data": {"streams": 16}}))
    by_folder = in_process("data", "show", corpus_values["path"])
    assert by_folder.returncode == 0
    assert "unigram entropy" in by_folder.stdout
    assert "raw text" in by_folder.stdout
    assert in_process("data", "show", "built.yaml").stdout == by_folder.stdout


def test_damage_to_a_corpus_is_found_and_named(here, corpus_values, in_process):
    shutil.copytree(corpus_values["path"], here / "copy")
    assert in_process("data", "verify", "copy").returncode == 0
    shard = here / "copy" / "train" / "shard-000003.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    result = in_process("data", "verify", "copy")
    assert result.returncode == 1
    assert str(shard) in result.stderr


def test_a_folder_without_a_corpus_cannot_be_verified(in_process):
    assert "no corpus at" in answer(in_process("data", "verify", "."))


# -------------------------------------------------------------------------------------- interruption, two launches


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_an_interrupted_command_says_how_to_go_on(number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(typer.Exit) as caught, resumable():
        signal.raise_signal(number)
    assert caught.value.exit_code == 75
    assert "run the same command again to continue" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_a_run_is_trained_by_one_launch_at_a_time(tmp_path):
    run_folder = tmp_path / "runs" / "first"
    with run_lock(RunFolder(run_folder)):
        second = pytest.raises(UserError, match=f"is being trained already, by process {os.getpid()} on")
        with second, run_lock(RunFolder(run_folder)):
            pass
        with run_lock(RunFolder(tmp_path / "runs" / "second")):
            pass
    with run_lock(RunFolder(run_folder)):
        pass
