"""Heartbeat files: what each rank writes of itself, and how others find it."""

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.run.attempt import Attempt


@dataclass(frozen=True)
class Heartbeat:
    """What a rank writes of itself."""

    rank: int
    host: str
    pid: int
    step: int
    doing: str
    still_s: float
    """Seconds that the main loop has been there."""


@dataclass(frozen=True)
class Sighting:
    """A heartbeat file as another rank finds it."""

    heartbeat: Heartbeat
    age_s: float
    """Seconds since it was written, by the file server's clock."""


def heartbeat_folder(attempt: Attempt) -> Path:
    """Folder in which the ranks of an attempt say where they are."""
    return attempt.run.heartbeats(attempt.number)


def heartbeat_path(attempt: Attempt, rank: int) -> Path:
    """One rank's file."""
    return heartbeat_folder(attempt) / f"rank-{rank:04d}.json"


def end_of(attempt: Attempt) -> str | None:
    """Why the watchdog of some rank ended the attempt so that it can be resumed; None if none did."""
    try:
        return (heartbeat_folder(attempt) / "end.txt").read_text(encoding="utf-8")
    except OSError:
        return None


def remove_older(attempt: Attempt) -> None:
    """Delete the heartbeats of the attempts before this one."""
    for folder in heartbeat_folder(attempt).parent.glob("attempt-*"):
        if folder.name < heartbeat_folder(attempt).name:
            shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------- who is to blame


def look_at(attempt: Attempt, ranks: Sequence[int]) -> dict[int, Sighting]:
    """The heartbeats that can be read, with their age against the newest of them: one clock, the file server's."""
    found: dict[int, tuple[Heartbeat, float]] = {}
    for rank in ranks:
        path = heartbeat_path(attempt, rank)
        with suppress(OSError, ValueError, TypeError):
            found[rank] = Heartbeat(**json.loads(path.read_text())), path.stat().st_mtime
    newest = max((written for _, written in found.values()), default=0.0)
    return {rank: Sighting(beat, newest - written) for rank, (beat, written) in found.items()}
