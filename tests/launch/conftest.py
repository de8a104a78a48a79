"""Slurm's commands as small scripts that write down how they were called: what we ask of Slurm, without a cluster."""

import os
from pathlib import Path

import pytest

SCRIPTS = {
    "sbatch": """
        case $* in *--test-only*) exit 0 ;; esac
        cat >/dev/null
        number=$(cat "$here/number")
        if [ -e "$here/refuse-$number" ]; then
            echo "sbatch: error: Batch job submission failed: Invalid account" >&2
            exit 1
        fi
        echo $((number + 1)) >"$here/number"
        echo "$number"
        """,
    "squeue": 'cat "$here/queue"',
    "scancel": "",
    "scontrol": """
        case $* in
            *"show partition"*) echo "PartitionName=main Default=YES State=UP MaxNodes=UNLIMITED TotalNodes=8" ;;
            *"show hostnames"*) echo "node1" ;;
        esac
        """,
    "sacct": "exit 1",
    "srun": 'cat >/dev/null; [ ! -e "$here/srun-does" ] || . "$here/srun-does"',
}


class FakeSlurm:
    """The commands, and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.queue()
        (folder / "number").write_text("101\n")
        for name, does in SCRIPTS.items():
            script = folder / name
            script.write_text(f'#!/bin/bash\nhere="{folder}"\necho "{name} $*" >>"$here/calls"\n{does}\n')
            script.chmod(0o755)

    def queue(self, **states: str) -> None:
        """Let the queue hold jobs: `job_101="RUNNING"`."""
        lines = [f"{job.removeprefix('job_')}|{state}||\n" for job, state in states.items()]
        (self.folder / "queue").write_text("".join(lines))

    def refuse(self, number: int) -> None:
        """Refuse the job that would get this number."""
        (self.folder / f"refuse-{number}").touch()

    def srun_does(self, shell: str) -> None:
        """What ranks do: lines of bash, with srun's arguments."""
        (self.folder / "srun-does").write_text(shell)

    def calls(self, *commands: str) -> list[str]:
        """The calls of some commands, oldest first."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if line.split()[0] in commands]


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    slurm = FakeSlurm(tmp_path / "fake slurm")
    monkeypatch.setenv("PATH", f"{slurm.folder}{os.pathsep}{os.environ['PATH']}")
    return slurm
