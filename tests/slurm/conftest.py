"""A real Slurm cluster of four nodes on this machine, shared by all tests that need one."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.slurm.starts import Start, read_starts
from pretrain.run.folder import RunFolder
from tests.conftest import write_texts

ROOT = Path(__file__).parents[2]
TOOL = ROOT.parent / "shared" / "slurm-cluster"
PATIENCE_S = 240.0

CONFIG = """
corpus: {path: corpus, sources: [{path: raw}], tokenizer: {vocab_size: 120, byte_fallback: false},
  min_train_shards: 16, splits: {valid: 0.1, test: 0.1}}
data: {sequence_length: 32, streams: 16, workers: 0}
model: {hidden_size: 32, num_layers: 2, num_heads: 2}
training: {tokens: 100_000, batch_size: 16, validation_rows: 32, validate_every: 50, log_every: 2, precision: fp32}
checkpoint: {every: 10, keep_last: 3}
evaluation: {windows: 16, lengths: [1, 2]}
cluster: {nodes: 1, cpus_per_task: 1, mem: 500M, evaluation: {cpus: 1, mem: 500M}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(600))


class Cluster:
    """The cluster, and a working directory that its nodes share."""

    def __init__(self, folder: Path, project: Path) -> None:
        self.folder, self.project = folder, project
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "etc" / "slurm.conf"), "PYTHONPATH": str(ROOT)}
        # Where jobs find `diptych`, and tools that a test pretends to have.
        self.tools = folder.parent / "bin"
        path = f"{self.tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment |= {"COLUMNS": "250", "NO_COLOR": "1", "PATH": path}

    def tool(self, command: str, *arguments: str) -> None:
        """Run slurm-cluster."""
        subprocess.run([TOOL, command, self.folder, *arguments], check=True, capture_output=True, timeout=120)

    def ask(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            command, env=self.environment, cwd=self.project, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    def diptych(self, *arguments: str, code: int = 0, home: Path = ROOT) -> str:
        """Run the command line in the project, with the code of `home`; returns what it printed."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "launch.cli", *arguments],
            cwd=self.project,
            env={**self.environment, "PYTHONPATH": str(home)},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def run(self, name: str) -> Path:
        """A run's folder."""
        return self.project / "runs" / name

    def starts(self, name: str) -> list[Start]:
        """Of a run, as its jobs wrote them down."""
        return read_starts(RunFolder(self.run(name)))

    def job(self, name: str, what: str = "train") -> str:
        """The id of a run's newest job."""
        record = sorted(self.run(name).glob("submissions/*/submission.json"))[-1]
        return str(json.loads(record.read_text())["jobs"][what])

    def state(self, job_id: str) -> str:
        """Slurm's word for a job's state."""
        return self.ask("squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T").splitlines()[0]

    def wait(self, condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> None:
        """Until `condition` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} within {seconds:.0f} s\n{self.story()}"
            time.sleep(0.1)

    def wait_for_state(self, job_id: str, *states: str) -> None:
        """Until a job is in one of the states; the first is the one hoped for."""
        self.wait(lambda: self.state(job_id) in (*states, "FAILED", "COMPLETED", "CANCELLED"), f"{states} of {job_id}")
        assert self.state(job_id) in states, self.story()

    def wait_for_step(self, name: str, step: int) -> None:
        """Until a run has recorded a step."""
        self.wait(lambda: self.steps(name)[-1:] >= [step], f"step {step} of {name}")

    def steps(self, name: str) -> list[int]:
        """The recorded steps of a run."""
        return [step for step, *_ in losses(self.run(name))]

    def story(self) -> str:
        """For the message of a failure: the queue, and how jobs and logs end."""
        parts = [self.ask("squeue", "--states=all", "--array"), self.ask("sinfo", "-N", "-o", "%N %T %E")]
        ranks = sorted(self.project.glob("runs/**/rank-0000.log"), key=lambda path: path.stat().st_mtime)
        paths = [*sorted(self.project.glob("runs/**/submissions/*/*.out")), *ranks[-3:]]
        parts += [f"== {path}\n" + "\n".join(path.read_text().splitlines()[-8:]) for path in paths]
        return "\n".join(parts)

    def rank_processes(self, name: str) -> dict[str, int]:
        """Process ids on this machine of a run's ranks, by the node that each runs on."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                if b"pretrain.training" in words and str(self.run(name)).encode() in words:
                    environment = (process / "environ").read_bytes().split(b"\0")
                    node = next(v[len(b"SLURMD_NODENAME=") :] for v in environment if v.startswith(b"SLURMD_NODENAME="))
                    found[node.decode()] = int(process.name)
            except (OSError, StopIteration):
                continue
        return found


def losses(run: Path) -> list[tuple[int, float, str]]:
    """Step, loss and checksum of the rows of each recorded step."""
    records = [r for r in RunFolder(run).metrics() if "loss" in r]
    return [(r["step"], r["loss"], r["rows_checksum"]) for r in records]


@contextlib.contextmanager
def started(*options: str) -> Iterator[Cluster]:
    """A cluster of our own, and an empty project beside it; both are gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder / "c", folder / "my project")
    cluster.project.mkdir()
    (cluster.project / "tiny.yaml").write_text(CONFIG)
    try:
        cluster.tool("up", *options)
        yield cluster
    finally:
        cluster.tool("down")
        shutil.rmtree(folder, ignore_errors=True)


def need(*programs: str, install: str) -> None:
    """Skip the test where Slurm, or the tool that makes a cluster of it, is not there."""
    if not TOOL.is_file():
        pytest.skip(f"no test cluster: {TOOL} is not there")
    if not all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in programs):
        pytest.skip(f"no Slurm on this machine: apt-get install {install}")


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """The cluster, with a built corpus; nodes n1 to n4, whose KillWait is longer than we ever want to wait."""
    need("sbatch", "slurmctld", "munged", install="munge slurmctld slurmd slurm-client")
    options = ["--nodes", "4", "--node-timeout", "10", "--requeue-delay", "5", "--kill-wait", "30"]
    with started(*options) as cluster:
        write_texts(cluster.project / "raw", 160)
        cluster.diptych("data", "build", "tiny.yaml")
        yield cluster


@pytest.fixture(scope="session")
def whole(slurm: Cluster) -> Path:
    """The run that all the others are compared with: unbroken, on four ranks of this machine, without Slurm."""
    slurm.diptych("train", "tiny.yaml", "name=whole", "--nproc", "4")
    return slurm.run("whole")


@pytest.fixture(autouse=True)
def _all_nodes_are_well_again(slurm: Cluster) -> Iterator[None]:
    """After each test: no job is left, and no node is down or draining on its account."""
    yield
    slurm.ask("scancel", f"--user={os.getuid()}")
    for node in slurm.ask("sinfo", "-h", "-N", "-p", "main", "-o", "%N").split():
        slurm.tool("start", node)
    slurm.wait(lambda: not slurm.ask("squeue", "-h"), "empty queue")
    slurm.wait(
        lambda: set(slurm.ask("sinfo", "-h", "-p", "main", "-o", "%T").split()) <= {"idle", "mixed", "allocated"},
        "idle nodes",
    )


def kill(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
