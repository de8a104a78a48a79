"""What a run folder says of itself, and what Slurm says of its jobs: the list of all runs in a folder. Only reads."""

import difflib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from launch.slurm.queries import JobState, SlurmSilentError, job_states
from launch.slurm.starts import last_end
from launch.slurm.submission import Submission, newest_submission
from launch.terminal.console import compact, duration
from launch.terminal.tables import number, table
from pretrain.errors import UserError
from pretrain.run.attempt import newest_attempt
from pretrain.run.folder import RunFolder
from pretrain.run.status import LIVE_STATES, Status

SWEEP = "sweep.json"
LOST_AFTER_S = 60.0
"""A run that claims to be at work, but whose heartbeat is older than this, is lost."""


@dataclass(frozen=True)
class RunRow:
    """One line of `diptych runs`."""

    name: str
    run: RunFolder
    state: str
    status: Status | None = None
    """What it wrote last; speed and time left are only there while it is at work."""
    age_s: float | None = None
    """Seconds since the last heartbeat."""
    message: str | None = None
    """Why it ended the last time; None where it did not, or was done."""
    restarts: int | None = None
    """Starts after the first."""
    slurm: str | None = None
    """What Slurm says of its job; None where it was not submitted."""


def list_runs(folder: Path, now: float | None = None) -> list[RunRow]:
    """Every run in `folder`, and every member of its sweeps, by name. `now` is Unix time in seconds.

    A run is a sub-folder with a config.yaml, a sweep one with a sweep.json and its members in it.
    """
    if not folder.is_dir():
        return []
    now = time.time() if now is None else now
    members = [run for sweep in folder.glob(f"*/{SWEEP}") for run in RunFolder.inside(sweep.parent)]
    found = sorted([*RunFolder.inside(folder), *members], key=lambda run: run.config_file)
    rows = [describe_run(run, now) for run in found]
    return [replace(row, name=str(row.run.path.relative_to(folder))) for row in rows]


def describe_run(run: RunFolder, now: float) -> RunRow:
    """One run as it stands at `now`; a missing or damaged status.json is a state, not an error."""
    status = run.status()
    ended = last_end(run)
    if status is None:
        state = "unreadable status.json" if run.status_file.exists() else "not started"
        return RunRow(run.name, run, state, message=ended)
    age_s = max(0.0, now - status.heartbeat)
    state, lost = status.state, status.state in LIVE_STATES and age_s > LOST_AFTER_S
    if lost or state not in LIVE_STATES:
        status = status.model_copy(update={"tokens_per_s": None, "seconds_left": None})
    return RunRow(
        run.name,
        run,
        state=f"lost (last seen {duration(age_s)} ago)" if lost else state,
        status=status,
        age_s=age_s,
        message=None if state == "done" else status.message or ended,
        restarts=max(0, newest_attempt(run) - 1),
    )


def with_slurm(rows: list[RunRow]) -> tuple[list[RunRow], str | None]:
    """The rows with what Slurm says of those that were submitted, and a warning where it says nothing at all."""
    submissions = {row.run: newest_submission(row.run) for row in rows}
    job_ids = {job_id for submission in submissions.values() if submission for job_id in submission.jobs.values()}
    warning = None
    states: dict[str, JobState] | None = None
    try:
        states = job_states(job_ids)
    except SlurmSilentError as error:
        warning = f"{error}; the states are those that the runs wrote themselves, by their heartbeats"
    found = []
    for row in rows:
        submission = submissions[row.run]
        found.append(row if submission is None or not submission.jobs else _with_jobs(row, submission, states))
    return found, warning


def _with_jobs(row: RunRow, submission: Submission, states: dict[str, JobState] | None) -> RunRow:
    """A row with the state of the job that is at work or comes next, or else of the last one that Slurm remembers."""
    if states is None:
        return replace(row, slurm="no answer")
    known = [(job, state) for job in submission.jobs if (state := submission.state_of(job, states)) is not None]
    if not known:
        return replace(row, slurm="forgotten")
    # An evaluation stays in the queue for some seconds after the training that it waits for has failed.
    known = [k for k in known if k[0] == "train" and k[1].is_failed] or known
    job, state = next(((j, s) for j, s in known if s.is_open), known[0])
    words = [submission.jobs[job], *(["evaluation"] if job != "train" else []), state.state.lower().replace("_", " ")]
    if state.is_waiting and state.reason:
        words.append(f"({state.reason})")
    error = state.comment.partition(" error: ")[2]
    ended = row.message
    if not state.is_open and job == "train" and state.state not in ("COMPLETED", "FAILED"):
        ended = f"Slurm: {state.state.lower().replace('_', ' ')}"
    return replace(row, slurm=" ".join(words), message=error or ended)


def find_run(name: str, folder: Path = Path("runs")) -> RunFolder:
    """The run folder that `name` means: a path, or a name inside `folder`.

    Raises:
        UserError: there is no such run; names the nearest.
    """
    for candidate in (folder / name, Path(name).expanduser()):
        if (run := RunFolder(candidate.absolute())).is_run:
            return run
    names = [row.name for row in list_runs(folder)]
    nearest = difflib.get_close_matches(name, names, n=1)
    there = f"there are {', '.join(names)}" if names else f"there are no runs in {folder.absolute()}"
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise UserError(f"no run {name!r}: neither a run folder nor a name in {folder.absolute()}; {there}{hint}")


def runs_meant(names: Sequence[str], folder: Path) -> list[RunFolder]:
    """Run folders by name or path; a folder that holds runs, a sweep's for instance, stands for all of them.

    Raises:
        UserError: one of the names is neither.
    """
    found: list[RunFolder] = []
    for name in names:
        places = [place for place in (folder / name, Path(name).expanduser()) if place.is_dir()][:1]
        members = [row for place in places if not RunFolder(place).is_run for row in list_runs(place)]
        found += [RunFolder(row.run.path.absolute()) for row in members] or [find_run(name, folder)]
    return found


STATE_STYLES = {"done": "green", "failed": "red", "lost": "red", "interrupted": "yellow", "training": "cyan"}


def runs_table(rows: Sequence[RunRow]) -> Table:
    """`diptych runs`."""
    columns = ["run", "state", "step", "tokens", "loss", "validation loss", "tokens/s", "last seen", "left", "restarts"]
    submitted = any(row.slurm for row in rows)
    if submitted:
        columns.insert(1, "Slurm")
    cells = (_run_cells(row, submitted) for row in rows)
    return table(None, columns, cells, numbers_from=3 if submitted else 2)


def why_ended(rows: Sequence[RunRow]) -> list[str]:
    """Below the table: a line for each run that has something to say of its end."""
    return [f"{row.name} ended the last time: {row.message}" for row in rows if row.message]


def _run_cells(row: RunRow, submitted: bool) -> list[str | Text]:
    status, measured = row.status, ["-"] * 7
    if status is not None:
        measured = [
            str(status.step),
            f"{compact(status.tokens)} of {compact(status.total_tokens)}",
            number(status.loss),
            number(status.validation_loss),
            "-" if status.tokens_per_s is None else compact(status.tokens_per_s),
            f"{duration(row.age_s or 0.0)} ago",
            "-" if status.seconds_left is None else duration(status.seconds_left),
        ]
    state = Text(row.state, style=STATE_STYLES.get(row.state.split()[0], ""))
    return [row.name, *([row.slurm or "-"] if submitted else []), state, *measured, number(row.restarts, "d")]
