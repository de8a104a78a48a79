"""One room spells the names in a run folder; the others, and the shell scripts of jobs, agree with it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from launch.run_list import SWEEP
from pretrain.checkpoint.format import MANIFEST_FILE
from pretrain.run.folder import RunFolder

ROOT = Path(__file__).parents[2]


CALLS_WITH_PATHS = ("glob", "rglob", "joinpath", "with_name")


def names_in_a_run_folder() -> set[str]:
    run = RunFolder(Path("/runs/run"))
    values = [getattr(run, name) for name, value in vars(RunFolder).items() if isinstance(value, property)]
    paths = [value for value in values if isinstance(value, Path) and value.is_relative_to(run.path)]
    return {path.relative_to(run.path).parts[0] for path in paths}


def as_paths(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The constant strings of a file that are a part of a path: file names, what is divided by, what is globbed for."""
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.right]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) in CALLS_WITH_PATHS:
            parts = node.args
        for part in parts:
            for constant in ast.walk(part):
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    yield constant.lineno, constant.value
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(".") == 1:
            yield node.lineno, node.value


def test_no_other_room_spells_a_name_that_lies_in_a_run_folder():
    names = names_in_a_run_folder()
    assert {"config.yaml", "status.json", "checkpoints", "attempts", "cancelled", "evaluation"} <= names
    spelled = []
    for path in [*(ROOT / "pretrain").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        if path != ROOT / "pretrain" / "run" / "folder.py":
            found = as_paths(ast.parse(path.read_text()))
            spelled += [f"{path}:{line}: {text!r}" for line, text in found if names & set(text.split("/"))]
    assert not spelled, "\n".join(spelled)


def test_the_scripts_of_jobs_write_and_look_where_the_run_folder_says():
    jobs = ROOT / "launch" / "slurm" / "jobs"
    text = "".join(path.read_text() for path in [*jobs.glob("*.sh"), *(ROOT / "slurm").glob("*.sbatch")])
    run = RunFolder(Path("$run"))
    meant = [run.jobs_file, run.cancelled, run.checkpoints / "step-*" / MANIFEST_FILE]
    meant += [run.path / SWEEP, run.path / "*" / run.config_file.name]  # of a sweep and its members
    assert set(re.findall(r"\$run[^\s;)]*/[^\s;)]*", text.replace('"', ""))) == set(map(str, meant))
