"""The members of a sweep: a config for every point of a grid. execution.py trains them, sweep_report.py compares them.

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

from launch.run_list import SWEEP
from pretrain.config.load import load_config
from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.files import write_json
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
    """Make the members over axes that are made already; see `plan_sweep`."""
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
