"""`diptych checkpoint` and `diptych export-weights`, on the checkpoints of a real run."""

import json
import shutil

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from launch.cli import app
from launch.saved import export_weights
from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.format import step_of
from pretrain.checkpoint.tensors import load_weights
from pretrain.config.load import load_config, to_yaml
from pretrain.errors import UserError
from pretrain.run.folder import RunFolder


def run_command(*arguments: object, exit_code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
    assert done.exit_code == exit_code, (done.output, done.exception)
    return done.output + (str(done.exception) if isinstance(done.exception, UserError) else "")


@pytest.fixture
def run(finished):
    return finished.run_folder


@pytest.fixture
def paths(run):
    return list_checkpoints(run / "checkpoints")


def test_list_shows_every_checkpoint_and_what_is_missing(run, paths):
    (paths[0] / "state.json").unlink()
    lines = run_command("checkpoint", "list", run).splitlines()
    listed = [line.split() for line in lines if line.split() and line.split()[0].isdigit()]
    assert [int(words[0]) for words in listed] == [step_of(path) for path in paths]
    assert "state.json is missing" in " ".join(listed[0])
    assert [words[-1] for words in listed[1:]] == ["complete"] * 2


def test_show_says_what_a_checkpoint_holds(run, paths):
    shown = run_command("checkpoint", "show", run)
    assert f"Step {step_of(paths[-1])} of run" in shown
    for name in ("rank-00000.safetensors", "logits.safetensors", "index.json", "state.json", "exp_avg_sq"):
        assert name in shown
    assert "there are" in run_command("checkpoint", "show", run, "--step", 999, exit_code=1)


def test_verify_reads_every_byte(run, paths):
    assert run_command("checkpoint", "verify", run).count("is whole: 5 files") == 3
    victim = paths[1] / "rank-00000.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    told = run_command("checkpoint", "verify", run, exit_code=1)
    assert f"step {step_of(paths[1])} is damaged: 1 of 5 files" in told
    assert told.count("is whole") == 2
    run_command("checkpoint", "verify", run, "--step", step_of(paths[2]))


def test_prune_counts_valid_ones_only_and_never_takes_the_last_of_them(run, paths):
    first, middle, last = paths
    (last / "index.json").write_text("{}")
    assert f"would remove step {step_of(first)}" in run_command(
        "checkpoint", "prune", run, "--keep-last", 1, "--dry-run"
    )
    assert len(list_checkpoints(run / "checkpoints")) == 3
    told = run_command("checkpoint", "prune", run, "--keep-last", 1)
    assert "neither counted nor removed" in told
    assert list_checkpoints(run / "checkpoints") == [middle, last]
    assert "--keep-last" in run_command("checkpoint", "prune", run, "--keep-last", 0, exit_code=2)
    (middle / "index.json").write_text("{}")
    assert "0 removed" in run_command("checkpoint", "prune", run, "--keep-last", 1)


def test_exported_weights_are_the_saved_ones_and_give_the_saved_logits(run, paths, tmp_path):
    out = tmp_path / "new folder" / "weights.safetensors"
    told = run_command("export-weights", run, "--step", step_of(paths[0]), "--out", out)
    assert "largest difference to the logits stored at save time" in told
    assert "head.weight is not among them" in told
    exported, saved = load_file(out), load_weights(paths[0])
    assert exported.keys() == saved.keys()
    assert all(exported[name].equal(saved[name]) for name in saved)
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["step"], metadata["run"]) == (str(step_of(paths[0])), "run")
    assert json.loads(metadata["model"])["hidden_size"] == 32
    done = export_weights(RunFolder(run), None, out)
    assert (done.step, done.bytes) == (step_of(paths[-1]), out.stat().st_size)
    assert done.difference <= done.allowed


def test_weights_that_do_not_give_the_saved_logits_are_not_exported(run, tmp_path):
    config = run / "config.yaml"
    config.write_text(to_yaml(load_config(str(config), ["model.norm_eps=10"])))
    with pytest.raises(UserError, match="do not give the logits that were stored"):
        export_weights(RunFolder(run), None, tmp_path / "weights.safetensors")
    assert not (tmp_path / "weights.safetensors").exists()


def test_a_run_without_checkpoints_is_an_answer(run, paths, tmp_path):
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoints yet" in run_command("checkpoint", "list", run, exit_code=1)
    assert "train first" in run_command("export-weights", run, "--out", tmp_path / "x", exit_code=1)
