"""A submission: the folder in a run (or a sweep) that holds all that its jobs need, as it was when they were queued.

    submissions/001/
      submission.json   who, when, which job ids, the commit of the code
      code/             pretrain/, launch/ and configs/; the jobs run these
      code.diff         what differed from the commit, if the code lay in a git checkout
      settings.sh       what train.sh, rank.sh and evaluate.sh (copied here) need to know
      train.sbatch      what sbatch was given; evaluate.sbatch likewise
      token-...         by its unique name a node knows that it sees this very folder
      members           of a sweep: the run folders, one a line
      job-123.out       what the jobs print

Queues nothing; see queueing.py.
"""

import json
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.slurm.queries import JobState
from pretrain.config.load import config_folder
from pretrain.config.run import RunConfig
from pretrain.config.topology import works_with
from pretrain.errors import UserError
from pretrain.files import write_json, write_text
from pretrain.run.folder import RunFolder

RECORD = "submission.json"
HOME = Path(__file__).parents[2]
"""The folder that holds `pretrain` and `launch`."""


@dataclass
class Submission:
    """What `submission.json` says."""

    created: float
    """Unix time in seconds."""
    token: str
    jobs: dict[str, str] = field(default_factory=dict)
    """Job ids by what they do: train, evaluate."""
    commit: str | None = None
    """Commit of the code, with a + where it was changed since; None outside a git checkout."""

    def state_of(self, job: str, states: Mapping[str, JobState]) -> JobState | None:
        """The state of one of its jobs among all `states`; None where Slurm has forgotten it.

        Ids repeat on a cluster that was set up anew: a job with another comment is somebody else's.
        """
        state = states.get(self.jobs.get(job, ""))
        return state if state is not None and (not state.comment or self.token in state.comment) else None

    def write(self, folder: Path) -> None:
        """Write it into a submission's folder."""
        write_json(folder / RECORD, asdict(self))


def submissions_of(run: RunFolder) -> Iterator[tuple[Path, Submission]]:
    """Yield the folders of a run's submissions and what they say, newest first; unreadable ones are passed over."""
    for record in sorted(run.submissions.glob(f"*/{RECORD}"), reverse=True):
        with suppress(OSError, ValueError, TypeError):
            yield record.parent, Submission(**json.loads(record.read_bytes()))


def newest_submission(run: RunFolder) -> Submission | None:
    """The last submission of a run; None where there was none."""
    return next((submission for _, submission in submissions_of(run)), None)


def make_folder(submissions: Path) -> Path:
    """The next submission's folder of a run or a sweep, private and empty."""
    number = max((int(p.name) for p in submissions.glob("[0-9]*") if p.name.isdigit()), default=0) + 1
    folder = submissions / f"{number:03d}"
    folder.mkdir(parents=True, mode=0o700)
    return folder


def new_submission(
    submissions: Path, config: RunConfig, members: Sequence[Path] = (), variables: Mapping[str, str] | None = None
) -> tuple[Path, Submission]:
    """The next submission of a run or a sweep, with all that its jobs need, and its folder.

    `variables` are environment variables of its ranks.

    Raises:
        UserError: it cannot be written; nothing of it is left.
    """
    folder = submissions
    try:
        folder = make_folder(submissions)
        return folder, fill_folder(folder, config, members, variables)
    except OSError as error:
        if folder != submissions:
            shutil.rmtree(folder, ignore_errors=True)
        # shutil collects what went wrong: (from, to, why) for each file.
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror
        raise UserError(
            f"cannot write {folder} ({reason}); make room or get the right to write there, or set runs=FOLDER"
        ) from error


def fill_folder(
    folder: Path, config: RunConfig, members: Sequence[Path] = (), variables: Mapping[str, str] | None = None
) -> Submission:
    """Copy the code into a submission's folder and write what its jobs need; `members` are the runs of a sweep."""
    submission = Submission(time.time(), secrets.token_hex(8))
    (folder / f"token-{submission.token}").touch()
    submission.commit = copy_code(folder)
    for script in sorted((HOME / "launch" / "slurm" / "jobs").glob("*.sh")):
        shutil.copy2(script, folder)
    write_text(folder / "settings.sh", settings(config, submission.token, variables))
    if members:
        write_text(folder / "members", "".join(f"{run}\n" for run in members))
    submission.write(folder)
    return submission


def copy_code(folder: Path) -> str | None:
    """Copy the packages and configs to `code/`, and what git knows of them beside it; returns the commit."""
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "configs")
    for package in ("pretrain", "launch"):
        shutil.copytree(HOME / package, folder / "code" / package, ignore=ignore)
    shutil.copytree(config_folder(), folder / "code" / "configs")
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    difference = _git("diff", "HEAD", "--", "pretrain", "launch", "configs")
    if difference:
        write_text(folder / "code.diff", difference)
    return commit.strip() + ("+" if difference else "")


def _git(*arguments: str) -> str | None:
    """What git says of the folder of the code; None where that is not in a checkout of its own, or there is no git."""
    if not (HOME / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(HOME), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def settings(config: RunConfig, token: str, variables: Mapping[str, str] | None = None) -> str:
    """The text of settings.sh; `variables` are for the environment of the ranks."""
    cluster = config.cluster
    srun_arguments, python = _container(config)
    values: dict[str, Any] = {
        "run": str(config.run_folder),
        "token": token,
        "node_counts": " ".join(map(str, node_counts(config))),
        "tasks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cpus_per_rank(config),
        "max_requeues": cluster.max_requeues,
    }
    lines = [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    lines += [f"srun_arguments=({shlex.join(srun_arguments)})", f"python=({shlex.join(python)})"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in (variables or {}).items()]
    return "# What this submission asked for; sourced by train.sh, rank.sh and evaluate.sh.\n" + "\n".join(lines) + "\n"


def cpus_per_rank(config: RunConfig) -> int:
    """CPU cores of each rank: for itself, and for its loader's processes."""
    return config.cluster.cpus_per_task or 1 + config.data.workers


def node_counts(config: RunConfig) -> list[int]:
    """Numbers of nodes that the run can train on, largest first; streams and batches must divide among the ranks."""
    cluster = config.cluster
    fewest = cluster.min_nodes or cluster.nodes
    return [n for n in range(cluster.nodes, fewest - 1, -1) if works_with(config, n * cluster.ranks_per_node)]


def _container(config: RunConfig) -> tuple[list[str], list[str]]:
    """Arguments of srun, and the words that start Python."""
    cluster = config.cluster
    if cluster.container is None:
        return [], [cluster.python or sys.executable]
    python = cluster.python or "python3"
    cache = [config.data.cache] if config.data.cache else []
    mounts = [str(path) for path in dict.fromkeys([config.runs, config.corpus.path, *cache])]
    runtime = cluster.container_runtime
    if runtime == "apptainer" or (runtime == "auto" and cluster.container.endswith(".sif")):
        binds = [word for path in mounts for word in ("--bind", path)]
        return [], [
            "apptainer",
            "exec",
            *(["--nv"] if cluster.gpus_per_node else []),
            *binds,
            cluster.container,
            python,
        ]
    joined = ",".join(f"{path}:{path}" for path in mounts)
    return [f"--container-image={cluster.container}", f"--container-mounts={joined}"], [python]
