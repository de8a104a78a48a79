"""Which rank is to blame when a run makes no progress."""

import os
import time
from pathlib import Path

from pretrain.training.monitor.heartbeats import Heartbeat, Sighting
from pretrain.training.monitor.places import AGREEING, READING

BEFORE_MEETING = (READING.doing, AGREEING.doing)
"""Places before the first collective of a step, in their order."""
LISTED = 8
"""Number of ranks that a diagnosis names at most."""


def silent_ranks(sightings: dict[int, Sighting], world_size: int, tick_s: float) -> list[int]:
    """Ranks whose thread does not write any more: stopped, dead, or cut off."""
    return [rank for rank in range(world_size) if rank in sightings and sightings[rank].age_s > 5 * tick_s]


def diagnose(sightings: dict[int, Sighting], world_size: int, tick_s: float) -> str:
    """Which ranks the others wait for, since when, and where they are."""
    silent = silent_ranks(sightings, world_size, tick_s)
    if silent:
        lines = [_of_silent(sightings[rank]) for rank in silent[:LISTED]]
        return _listed("silent", len(silent), lines)
    unseen = [rank for rank in range(world_size) if rank not in sightings]
    if unseen:
        return _listed("never seen", len(unseen), [f"rank {rank}" for rank in unseen[:LISTED]])
    beats = [sighting.heartbeat for sighting in sightings.values()]
    first = min(beats, key=_order)
    behind = [beat for beat in beats if _order(beat) == _order(first)]
    if len(behind) == len(beats):
        return (
            f"no rank makes progress: all {world_size} are {first.doing}, step {first.step}, for "
            f"{first.still_s:.0f} s; their logs have the stack traces"
        )
    lines = [f"rank {beat.rank} is {beat.doing}, step {beat.step}, for {beat.still_s:.0f} s" for beat in behind]
    return _listed("behind", len(behind), lines[:LISTED])


def _order(beat: Heartbeat) -> tuple[int, int]:
    """How far a rank has come: what holds it up before the first collective of a step is its own doing."""
    return beat.step, BEFORE_MEETING.index(beat.doing) if beat.doing in BEFORE_MEETING else len(BEFORE_MEETING)


def _of_silent(sighting: Sighting) -> str:
    beat = sighting.heartbeat
    since = time.strftime("%H:%M:%S", time.localtime(time.time() - sighting.age_s))
    line = f"rank {beat.rank} (process {beat.pid} on {beat.host}) is silent since {since}, {sighting.age_s:.0f} s"
    line += f"; it was {beat.doing}, step {beat.step}"
    state = process_state(beat.pid) if beat.host == os.uname().nodename else None
    return line + (f"; its process {state}" if state else "")


def _listed(what: str, count: int, lines: list[str]) -> str:
    more = f", and {count - len(lines)} more" if count > len(lines) else ""
    return f"{count} rank{'s' if count > 1 else ''} {what}: {'; '.join(lines)}{more}"


def process_state(pid: int) -> str | None:
    """What the kernel says of a process of this machine (Linux)."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "is gone"
    except OSError:
        return None
    return {"T": "is stopped (SIGSTOP)", "t": "is held by a debugger", "Z": "has ended", "D": "waits for a disk"}.get(
        letter
    )
