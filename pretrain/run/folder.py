"""`RunFolder`: every path and every file of a run. No other room spells a name that lies in a run folder.

    runs/NAME/
      config.yaml        the settings that its last step was trained under
      environment.json   what it ran on
      metrics.jsonl      a record for each step and each validation
      status.json        how it is doing
      attempts/          each start: who, when, and its settings (attempt.py)
      logs/              attempt-0002/rank-0000.log
      heartbeats/        attempt-0002/rank-0000.json
      checkpoints/       step-00001000/ and so on (pretrain/checkpoint)
      evaluation/        a folder for each report, and for each recalibration, which is a run too
      tensorboard/  profile/
      submissions/  jobs.jsonl  cancelled        of a run that was submitted to Slurm (launch/slurm)
    runs/.NAME.lock      the run lock (lock.py)

The shell scripts of Slurm jobs know a few of these names too; a test says that they are the same.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.folder import newest_state
from pretrain.checkpoint.format import TrainingState, checkpoint_name
from pretrain.config.load import load_config, to_yaml
from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.files import replace_text, write_text
from pretrain.run.secrets import public, with_secrets
from pretrain.run.status import Status, parse_status


@dataclass(frozen=True)
class RunFolder:
    """What a run writes: where each file lies, and what the files say."""

    path: Path

    @classmethod
    def of(cls, config: RunConfig) -> "RunFolder":
        """The folder of the run with this config."""
        return cls(config.run_folder)

    @classmethod
    def inside(cls, folder: Path) -> list["RunFolder"]:
        """The runs in a folder of runs, by name."""
        return [cls(path.parent) for path in sorted(folder.glob("*/config.yaml"))]

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.path.name

    # ------------------------------------------------------------------------------------------------- paths

    @property
    def config_file(self) -> Path:
        """The resolved config, without secrets; also what makes a folder the folder of a run."""
        return self.path / "config.yaml"

    @property
    def environment_file(self) -> Path:
        """What the run ran on, see environment.py."""
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        """A line of JSON for each step and each validation."""
        return self.path / "metrics.jsonl"

    @property
    def status_file(self) -> Path:
        """How the run is doing, see status.py."""
        return self.path / "status.json"

    @property
    def lock_file(self) -> Path:
        """The run lock: beside the folder, because it is taken before that is made."""
        return self.path.with_name(f".{self.name}.lock")

    @property
    def attempts(self) -> Path:
        """Folder of the starts of the run, see attempt.py."""
        return self.path / "attempts"

    def attempt_config(self, attempt: int) -> Path:
        """The config that a start goes by, whether it is there or not."""
        return self.attempts / f"{attempt:04d}.yaml"

    @property
    def pending_config(self) -> Path:
        """The config for the next start, where it is another than the run's; gone once a step is trained under it."""
        return self.attempts / "next.yaml"

    @property
    def logs(self) -> Path:
        """Folder of what the ranks print."""
        return self.path / "logs"

    def log(self, attempt: int, rank: int) -> Path:
        """What a rank prints in an attempt: no two attempts write to one log."""
        return self.logs / f"attempt-{attempt:04d}" / f"rank-{rank:04d}.log"

    def logs_of(self, rank: int | None = None) -> list[Path]:
        """The logs that there are of a rank, or of all, oldest attempt first."""
        return sorted(self.logs.glob(f"attempt-*/rank-{'*' if rank is None else f'{rank:04d}'}.log"))

    def heartbeats(self, attempt: int) -> Path:
        """Folder in which the ranks of an attempt say where they are."""
        return self.path / "heartbeats" / f"attempt-{attempt:04d}"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of a step, whether it is there or not."""
        return self.checkpoints / checkpoint_name(step)

    @property
    def evaluation(self) -> Path:
        """Folder of the reports and the recalibrations."""
        return self.path / "evaluation"

    def report(self, evaluation: str) -> Path:
        """The report of an evaluation as JSON, whether it is there or not."""
        return self.evaluation / evaluation / "report.json"

    def reports(self) -> list[Path]:
        """The reports that there are, by name."""
        return sorted(self.evaluation.glob("*/report.json"))

    def evaluation_logs(self, evaluation: str) -> Path:
        """Folder of what the ranks of an evaluation print."""
        return self.evaluation / evaluation / "logs"

    @property
    def tensorboard(self) -> Path:
        """Folder for TensorBoard."""
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """Folder of the profiler's traces."""
        return self.path / "profile"

    @property
    def submissions(self) -> Path:
        """Folder of what was submitted to Slurm."""
        return self.path / "submissions"

    @property
    def jobs_file(self) -> Path:
        """What Slurm jobs wrote down of each start and end."""
        return self.path / "jobs.jsonl"

    @property
    def cancelled(self) -> Path:
        """A file that is there while the run's job must not go back into the queue."""
        return self.path / "cancelled"

    # -------------------------------------------------------------------------------------------- what they say

    @property
    def is_run(self) -> bool:
        """Whether this is the folder of a run."""
        return self.config_file.is_file()

    def config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The run's settings, passwords and tokens included.

        Raises:
            UserError: this is no run, the config is not valid, or it has a URL whose password is not in the
                environment.
        """
        return with_secrets(self.public_config(overrides))

    def public_config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The run's settings as they are written, for whoever needs none of the URLs whose passwords were left out.

        Raises:
            UserError: this is no run, or the config is not valid.
        """
        if not self.is_run:
            raise UserError(f"{self} is no run folder (it has no config.yaml); `diptych runs` lists them")
        return load_config(str(self.config_file), overrides)

    @property
    def next_config_file(self) -> Path:
        """The file that the next start goes by: a config that no step is trained under yet, or else the run's."""
        return self.pending_config if self.pending_config.is_file() else self.config_file

    def next_config(self) -> RunConfig:
        """The settings of the next start, passwords and tokens included; raises as `config` does."""
        return with_secrets(load_config(str(self.next_config_file)))

    def write_config(self, config: RunConfig) -> None:
        """Make these the run's settings, without secrets; none are pending any more."""
        text = to_yaml(public(config))
        if not self.is_run or self.config_file.read_text(encoding="utf-8") != text:
            write_text(self.config_file, text)
        self.pending_config.unlink(missing_ok=True)

    def status(self) -> Status | None:
        """How the run is doing; None where it has not said so, or not so that it can be read."""
        return parse_status(self.status_file)

    def write_status(self, status: Status) -> None:
        """Replace the status in one step; not flushed to the disk, since it is of no use after a crash."""
        replace_text(self.status_file, status.model_dump_json(indent=1))

    def metrics(self) -> list[dict[str, Any]]:
        """Records of steps and validations; a line that a killed process left unfinished is passed over."""
        records = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines() if self.metrics_file.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def world_size(self) -> int | None:
        """Number of ranks of the last start; None where that is not known."""
        try:
            return int(json.loads(self.environment_file.read_bytes())["world_size"])
        except (OSError, ValueError, KeyError):
            return None

    def newest_state(self) -> TrainingState | None:
        """State of the newest checkpoint whose manifest and state are whole; its tensors are not looked at."""
        return newest_state(self.checkpoints)

    def has_ended(self, tokens: int) -> bool:
        """Whether the run has seen so many tokens and ended, and its last checkpoint is still there."""
        status = self.status()
        if status is None or status.state != "done" or status.checkpoint is None:
            return False
        return (self.checkpoints / status.checkpoint).is_dir() and status.tokens >= tokens

    def begin_with(self, checkpoint: Path) -> None:
        """Copy a checkpoint of another run, as what this one goes on from; nothing is done once it has any."""
        if self.checkpoints.is_dir():
            return
        temporary = self.checkpoints.with_name(".checkpoints.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(checkpoint, temporary / checkpoint.name)
        temporary.rename(self.checkpoints)
