"""`diptych sweep`: a grid of runs, here one after another or on Slurm as an array. sweep_report.py shows what came out.

runs/SWEEP/
  sweep.json        the members, and where each lies on the axes
  MEMBER/           a run folder like any other
  submissions/      as of a run (submission.py), for all members together
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.runs import SWEEP
from launch.slurm.queries import check_cluster, check_script
from launch.slurm.scripts import evaluation_script, show_scripts, train_script
from launch.slurm.submission import Submission, make_folder, new_submission, refuse_if_queued
from launch.slurm.submit import find_manifest, open_run, queue_scripts
from launch.terminal.console import say
from pretrain.config.load import load_config
from pretrain.config.run import RunConfig
from pretrain.config.topology import check_topology
from pretrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUME_ME, UserError
from pretrain.files import write_json, write_text
from pretrain.run.folder import RunFolder

SEED = "seed"
"""The axis that results are averaged over."""


@dataclass(frozen=True)
class Point:
    """One value of an axis."""

    label: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    labels: dict[str, str]
    """Axis -> value, as they are called in tables."""
    overrides: list[str] = field(default_factory=list)


def axes_of(config: RunConfig, grid: Sequence[str]) -> dict[str, list[Point]]:
    """The axes of the config's section `sweep`, then those of `KEY=A,B`, which replace an axis of the same key.

    Raises:
        UserError: there are none, or one is not KEY=VALUE,...
    """
    axes: dict[str, list[Point]] = {}
    for axis, values in config.sweep.items():
        if isinstance(values, dict):
            axes[axis] = [
                Point(name, tuple(override(k, v) for k, v in group.items())) for name, group in values.items()
            ]
        else:
            axes[axis] = [Point(str(value), (override(axis, value),)) for value in values]
    for text in grid:
        key, equals, listed = text.partition("=")
        if not (equals and key and listed):
            raise UserError(f"{text!r} is not an axis KEY=VALUE,VALUE, for instance seed=1,2,3")
        axes[key] = [Point(value, (f"{key}={value}",)) for value in split_values(listed)]
    if not axes:
        raise UserError("no axes: give some, for instance --grid seed=1,2,3, or a section `sweep` in the config")
    return axes


def override(key: str, value: Any) -> str:
    """A setting as KEY=VALUE."""
    return f"{key}={json.dumps(value)}"


def split_values(text: str) -> list[str]:
    """The values of KEY=A,B,C: commas inside brackets separate nothing."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return values


def is_axis(text: str) -> bool:
    """Whether KEY=VALUE gives several values."""
    return len(split_values(text.partition("=")[2])) > 1


def members_of(axes: Mapping[str, Sequence[Point]]) -> list[Member]:
    """Every combination, the last axis changing fastest."""
    members = []
    for points in itertools.product(*axes.values()):
        labels = {axis: point.label for axis, point in zip(axes, points, strict=True)}
        # A value that is no word needs the one that it belongs to.
        words = [v if v[:1].isalpha() else f"{axis.rsplit('.', 1)[-1]}{v}" for axis, v in labels.items()]
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words))
        members.append(Member(name, labels, [override for point in points for override in point.overrides]))
    return members


@dataclass(frozen=True)
class Sweep:
    """A sweep, with the config of each member."""

    name: str
    folder: Path
    members: list[Member]
    configs: list[RunConfig]

    def write(self) -> None:
        """Write down what the members are, beside those that the sweep had before."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        known = read_members(self.folder) if (self.folder / SWEEP).exists() else []
        names = {member.name for member in self.members}
        listed = [*self.members, *(member for member in known if member.name not in names)]
        write_json(self.folder / SWEEP, {"format": 1, "members": [asdict(member) for member in listed]})


def plan_sweep(config_name: str, overrides: Sequence[str], grid: Sequence[str]) -> Sweep:
    """Make the members' configs, all of them valid.

    Raises:
        UserError: an axis or a member is wrong.
    """
    return sweep_over(config_name, overrides, axes_of(load_config(config_name, overrides), grid))


def sweep_over(config_name: str, overrides: Sequence[str], axes: Mapping[str, Sequence[Point]]) -> Sweep:
    """As `plan_sweep`, over axes that are made already."""
    base = load_config(config_name, overrides)
    folder = base.run_folder
    if RunFolder(folder).is_run:
        raise UserError(f"{folder} is a run of its own; give the sweep another name, name=NAME")
    members, configs = members_of(axes), []
    for member in members:
        changes = [*overrides, *member.overrides, f"runs={json.dumps(str(folder))}", f"name={member.name}"]
        configs.append(load_config(config_name, changes).model_copy(update={"sweep": {}}))
    return Sweep(base.name, folder, members, configs)


def read_members(folder: Path) -> list[Member]:
    """The members of a sweep.

    Raises:
        UserError: this is no sweep.
    """
    try:
        return [Member(**member) for member in json.loads((folder / SWEEP).read_bytes())["members"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no sweep: it has no readable {SWEEP}") from error


def is_finished(config: RunConfig) -> bool:
    """Whether a member is trained and evaluated."""
    run = RunFolder.of(config)
    return run.is_complete(config.training.tokens) and bool(run.reports())


def run_here(sweep: Sweep, num_ranks: int | None, console: Console) -> int:
    """Train and evaluate the members one after another; one that fails does not stop the rest.

    Returns:
        0 if all are done, 75 if it was interrupted, 1 if some failed.
    """
    from launch.train import choose_num_ranks, train

    failed = []
    for number, (member, config) in enumerate(zip(sweep.members, sweep.configs, strict=True), start=1):
        say(console, f"\n[{number}/{len(sweep.members)}] {member.name}", "bold")
        if is_finished(config):
            say(console, "  done already")
            continue
        try:
            exit_code = train(config, choose_num_ranks(config, num_ranks), console)
        except UserError as error:
            say(console, f"error: {error}", "red")
            exit_code = EXIT_FAILED
        if exit_code == EXIT_RESUME_ME:
            return exit_code
        if exit_code != EXIT_DONE:
            failed.append(member.name)
    if failed:
        say(
            console,
            f"\n{len(failed)} of {len(sweep.members)} failed: {', '.join(failed)}; the same command tries again",
        )
    return EXIT_FAILED if failed else EXIT_DONE


def show_sweep(sweep: Sweep, console: Console, *, local: bool) -> None:
    """Print the members and, unless they are to be trained here, what `submit_sweep` would send for them."""
    if not local:
        check_ranks(sweep)
    console.out(f"# {len(sweep.members)} members in {sweep.folder}", highlight=False)
    for number, member in enumerate(sweep.members):
        console.out(f"#   {number:3d}  {member.name}  {' '.join(member.overrides)}", highlight=False)
    if not local:
        show_scripts(sweep.configs[0], console, folder=sweep.folder, name=sweep.name, members=len(sweep.members))


def check_ranks(sweep: Sweep) -> None:
    """Refuse a number of ranks that a member's streams and batches cannot be divided by.

    Raises:
        UserError: with numbers that work.
    """
    for config in sweep.configs:
        check_topology(config, config.cluster.nodes * config.cluster.ranks_per_node, config.cluster.ranks_per_node)


def submit_sweep(sweep: Sweep, console: Console) -> None:
    """Queue the members that are neither finished nor at work, as one array, and an array of their evaluations.

    Raises:
        UserError: Slurm or a member's run folder refuses.
    """
    check_ranks(sweep)
    first = sweep.configs[0]
    check_cluster(first.cluster)
    waiting = [config for config in sweep.configs if not is_finished(config) and not _at_work(config, console)]
    if not waiting:
        say(console, "nothing to do: every member is finished or at work")
        return
    check_script(train_script(first, sweep.folder, "TOKEN", name=sweep.name, members=len(waiting)))
    for config in waiting:
        open_run(config, find_manifest(config), console)
    folder, submission = new_submission(
        RunFolder(sweep.folder).submissions, first, [config.run_folder for config in waiting]
    )
    scripts = {
        "train": train_script(first, folder, submission.token, name=sweep.name, members=len(waiting)),
        "evaluate": evaluation_script(first, folder, submission.token, name=sweep.name, members=len(waiting)),
    }
    for name, script in scripts.items():
        write_text(folder / f"{name}.sbatch", script)
    queue_scripts(folder, submission, scripts, after="aftercorr")
    for index, config in enumerate(waiting):
        jobs = {job: f"{job_id}_{index}" for job, job_id in submission.jobs.items()}
        own = Submission(submission.created, submission.token, jobs, submission.commit)
        own.write(make_folder(RunFolder.of(config).submissions))
    say(
        console,
        f"queued {len(waiting)} of {len(sweep.configs)} members of {sweep.name} as job {submission.jobs['train']}, "
        f"{first.cluster.array_parallelism} at a time; their evaluations follow as job {submission.jobs['evaluate']}",
    )
    say(console, f"watch them with `diptych runs`, see results with `diptych sweep show {sweep.name}`")


def _at_work(config: RunConfig, console: Console) -> bool:
    try:
        refuse_if_queued(RunFolder.of(config))
    except UserError as error:
        say(console, str(error))
        return True
    return False
