"""The attempt fence: each start of a run takes the next number, and only the newest may write to the run folder.

After a cut cable the old ranks go on beside the requeued job: two writers on one folder. Nothing can stop the old ones
from outside, so they look for themselves, before whatever counts. A number is a file that is created exclusively,
which is atomic on shared file systems too; no lock is held, so a crash leaves nothing behind.

Why no commit slips through: a save creates its temporary folder, then checks, then renames it. A start takes its
number, then moves all temporary folders away, then looks for checkpoints. So either the check sees the new number, or
the rename finds its folder gone, or it was done before the start looked. metrics.jsonl is replaced by each start, so
that a file still open in an older attempt is no longer the one in the run folder.

    attempts/0001.json, 0002.json, ...   who started, where and when
    attempts/0001.yaml, 0002.yaml, ...   the config that the start goes by
    attempts/next.yaml                   the config for the next start, while it is another than the run's config.yaml
    logs/attempt-0002/rank-0000.log      so that no two attempts write to one log
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pretrain.config.load import load_config
from pretrain.config.run import RunConfig
from pretrain.errors import UserError
from pretrain.files import write_text
from pretrain.run.folder import RunFolder
from pretrain.run.secrets import with_secrets

ATTEMPT_VARIABLE = "DIPTYCH_ATTEMPT"
"""The environment variable that holds the number a launcher took for its ranks; without it, rank 0 takes one."""


class SupersededError(Exception):
    """A newer attempt has taken the run over; this one must end without writing anything more."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run, as all its ranks see it."""

    run: RunFolder
    number: int

    def superseded_by(self) -> int | None:
        """The newest attempt, if that is not this one; costs listing a small folder.

        The folder is listed, rather than one name looked up, because network file systems cache that a name is absent.
        """
        newest = newest_attempt(self.run)
        return newest if newest > self.number else None

    def check(self) -> None:
        """Return only if this is still the newest attempt.

        Raises:
            SupersededError: it is not.
        """
        newer = self.superseded_by()
        if newer is not None:
            raise self._superseded(newer)

    def check_together(self) -> None:
        """`check`, as rank 0 sees it, on every rank; collective, on the CPU.

        Raises:
            SupersededError: on every rank.
        """
        import torch
        import torch.distributed as dist

        newer = torch.tensor(self.superseded_by() or 0 if not dist.is_initialized() or dist.get_rank() == 0 else 0)
        if dist.is_initialized():
            dist.broadcast(newer, src=0)
        if newer:
            raise self._superseded(int(newer))

    def _superseded(self, newer: int) -> SupersededError:
        return SupersededError(
            f"attempt {newer} has taken over {self.run}; this is attempt {self.number}, which writes nothing "
            "more and ends"
        )

    def config(self) -> RunConfig:
        """The settings that this start goes by, passwords and tokens included; raises as `RunFolder.config` does."""
        file = self.run.attempt_config(self.number)  # starts of earlier versions have none
        return with_secrets(load_config(str(file))) if file.is_file() else self.run.next_config()

    def trained_under(self, config: RunConfig) -> None:
        """Make `config` the run's, since a step was trained under it; not if a newer attempt has the run."""
        if not self.superseded_by():
            self.run.write_config(config)

    def log(self, rank: int) -> Path:
        """What a rank of this attempt prints."""
        return self.run.log(self.number, rank)


def newest_attempt(run: RunFolder) -> int:
    """The highest number taken; 0 where there is none."""
    try:
        numbers = [int(path.stem) for path in run.attempts.iterdir() if path.stem.isdigit()]
    except FileNotFoundError:
        return 0
    return max(numbers, default=0)


def take_attempt(run: RunFolder) -> Attempt:
    """Take the next number, and the config that the run was opened with last.

    Whoever held the number before is fenced off from now on.

    Raises:
        UserError: the run folder cannot be written.
    """
    folder = run.attempts
    who = {
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        while True:
            number = newest_attempt(run) + 1
            try:
                with (folder / f"{number:04d}.json").open("x", encoding="utf-8") as file:
                    file.write(json.dumps(who) + "\n")
            except FileExistsError:
                continue  # somebody else took it between the look and the creation
            if run.next_config_file.is_file():
                write_text(run.attempt_config(number), run.next_config_file.read_text(encoding="utf-8"))
            return Attempt(run, number)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); the run folder must be writable") from error


def agree_on_attempt(run: RunFolder) -> Attempt:
    """The attempt that the launcher took, or else one that rank 0 takes now; collective.

    Raises:
        SupersededError: a newer one was taken in the meantime.
        UserError: on every rank, if rank 0 cannot write to the run folder.
    """
    import torch.distributed as dist

    box: list[int | str] = [int(os.environ.get(ATTEMPT_VARIABLE, "0"))]
    if not box[0] and (not dist.is_initialized() or dist.get_rank() == 0):
        try:
            box = [take_attempt(run).number]
        except UserError as error:
            box = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], str):
        raise UserError(box[0])
    attempt = Attempt(run, box[0])
    attempt.check_together()
    return attempt
