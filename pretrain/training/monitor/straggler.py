"""Which rank is slow."""

import statistics
from typing import Any


def slowest(own: list[float]) -> dict[str, Any]:
    """The rank that needed the longest by itself, and how many times the median of the others that was."""
    rank = max(range(len(own)), key=own.__getitem__)
    others = statistics.median(own[:rank] + own[rank + 1 :])
    return {"slowest_rank": rank, "slowest_by": round(own[rank] / max(others, 1e-9), 3)}


class Straggler:
    """Tells when the same rank has been much slower than the others for a while."""

    FACTOR, TIMES = 1.5, 5

    def __init__(self) -> None:
        self._rank: int | None = None
        self._times = 0

    def look(self, record: dict[str, Any]) -> str | None:
        """Given each flushed record; a line when it is the `TIMES`th in a row to name the same rank."""
        slow = record["slowest_rank"] if record.get("slowest_by", 0) >= self.FACTOR else None
        self._times = self._times + 1 if slow == self._rank else 1
        self._rank = slow
        if slow is None or self._times != self.TIMES:
            return None
        return (
            f"rank {slow} is slow: for reading rows and its forward passes it needs {record['slowest_by']:.1f} times "
            "what the others need; they wait for it in every step"
        )
