"""jobs.jsonl of a run: what its Slurm jobs wrote down of each start and end, whatever Slurm forgets."""

import json
from dataclasses import dataclass

from pretrain.run.folder import RunFolder


@dataclass(frozen=True)
class Start:
    """One start of a run's training job."""

    job: str
    restart: int
    """Slurm's count of earlier starts of this job."""
    time: float
    """Unix time in seconds."""
    nodes: str
    ranks: int
    exit_code: int | None = None
    """None while it runs, and where it was ended from outside."""
    why: str | None = None

    @property
    def goes_on(self) -> bool:
        """Whether the job is at work, or in the queue again; jobs/train.sh has the words."""
        return self.why is None or "back into the queue" in self.why or "ended by Slurm" in self.why


def read_starts(run: RunFolder) -> list[Start]:
    """All starts, oldest first. A line that a dying node left unfinished is passed over."""
    starts: dict[tuple[str, int], Start] = {}
    try:
        lines = run.jobs_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            event = json.loads(line)
            key = event["job"], event["restart"]
            if event["event"] == "start":
                starts[key] = Start(*key, event["time"], event["nodes"], int(event["ranks"]))
            elif key in starts:
                old = starts[key]
                starts[key] = Start(*key, old.time, old.nodes, old.ranks, int(event["code"]), event["why"])
        except (ValueError, KeyError, TypeError):
            continue
    return list(starts.values())


def last_end(run: RunFolder) -> str | None:
    """Why the run's job ended the last time: also that of an earlier start, while a newer one is at work."""
    starts = read_starts(run)
    for start, newer in zip(reversed(starts), [None, *reversed(starts)], strict=False):
        if start.why is not None:
            return None if start.why == "done" else start.why
        if newer is not None:
            return f"ended from outside on {start.nodes}: a lost node, preemption or scancel"
    return None
