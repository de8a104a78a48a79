"""A member of a sweep inside a job of the user's own script."""

import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from launch.grid.sweep import Sweep, is_finished
from launch.slurm.in_job import prepare_run
from launch.terminal.console import say
from pretrain.errors import UserError


def prepare_member(sweep: Sweep, console: Console, environment: Mapping[str, str] = os.environ) -> Path | None:
    """As `prepare_run`, for the member of a sweep that the job's place in its array stands for.

    Raises:
        UserError: there is no such member, or see `prepare_run`.
    """
    task, last = environment.get("SLURM_ARRAY_TASK_ID"), len(sweep.members) - 1
    if task is None or int(task) > last:
        place = "this job is in no array" if task is None else f"there is no member {task}"
        raise UserError(
            f"{place}; the members of {sweep.name} are 0 to {last}: sbatch --array=0-{last}%4 slurm/sweep.sbatch CONFIG"
        )
    config = sweep.configs[int(task)]
    say(console, f"member {task} of {sweep.name}: {config.name}")
    if is_finished(config):
        say(console, f"{config.run_folder} is trained and evaluated already")
        return None
    sweep.write()
    return prepare_run(config, console, (), environment)
